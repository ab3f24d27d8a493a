"""Starts training runs in processes of their own and returns what each process found."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.modes import SHIMMED


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, eq=False)
class Case:
    """
    A training run in two processes.

    Args:
        mode (`str`): How the run is spread over them; cases of one mode share a launch, one after the other.
        settings (`dict[str, Any]`): What [`~tests.distributed.training.train`] is given.
        library (`str`): Which base model and candidates it uses.
        ends (`bool`): Whether the processes must end with it, so that it gets a launch of its own.
    """

    mode: str
    settings: dict[str, Any]
    library: str
    ends: bool

    def __str__(self) -> str:
        return "-".join(filter(None, (self.mode, self.settings.get("fault"))))


def case(mode: str = "ddp", *, library: str = "adapters", ends: bool = False, **settings: Any) -> Case:
    return Case(mode, settings, library, ends)


@dataclass(frozen=True)
class Run:
    """
    What came of a case.

    Args:
        directory (`Path`): Where it ran.
        ranks (`list[dict]`): What each process found; incomplete if the case failed.
        output (`str`): What the processes printed, where the launch failed.
        code (`int`): Exit code of the launcher.
        seconds (`float`): How long the case took; for one that ended its processes the whole launch.
    """

    directory: Path
    ranks: list[dict[str, Any]]
    output: str = ""
    code: int = 0
    seconds: float = 0.0

    @property
    def losses(self) -> list[float]:
        return self.ranks[0]["losses"]


class Launcher:
    """
    Runs cases when one of them is first asked for, all cases of its mode together.

    Args:
        directory (`Path`): For what they write.
        cases (`Iterable[Case]`): All that may be asked for.
        places (`Callable[[str], dict[str, Any]]`): Returns `base` and `candidates` of a library.
    """

    def __init__(self, directory: Path, cases: Iterable[Case], places: Callable[[str], dict[str, Any]]) -> None:
        self._directory, self._cases, self._places = directory, list(dict.fromkeys(cases)), places
        self._runs: dict[Case, Run] = {}
        self._launches = 0

    def __getitem__(self, wanted: Case) -> Run:
        waiting = [wanted]
        if not wanted.ends:
            waiting = [each for each in self._cases if each.mode == wanted.mode and not each.ends]
        while wanted not in self._runs:
            self._launch([each for each in waiting if each not in self._runs])
        return self._runs[wanted]

    def _launch(self, cases: Sequence[Case], world: int = 2) -> None:
        """Runs cases until one of them ends the processes; what comes after it stays to be run."""
        values, directories = [], []
        for each in cases:
            directories.append(self._directory / f"launch{self._launches}" / f"case{len(directories)}")
            directories[-1].mkdir(parents=True)
            values.append({"directory": str(directories[-1]), **self._places(each.library), **each.settings})
        self._launches += 1
        started = time.monotonic()
        # A machine that others load takes that much longer.
        patience = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        code, output = finish(start(torchrun(cases[0].mode, values, world)), patience * (120 + 60 * len(cases)))
        for each, directory in zip(cases, directories, strict=True):
            ranks = read_ranks(directory)
            if len(ranks) < world:
                self._runs[each] = Run(directory, ranks, output, code, time.monotonic() - started)
                return
            self._runs[each] = Run(directory, ranks, seconds=max(rank["seconds"] for rank in ranks))


def launch_nodes(
    directory: Path, places: dict[str, Any], environment: dict[str, str], nodes: int = 2, processes: int = 2
) -> list[Run]:
    """Starts one torchrun a node; each node has a Hub cache, a user cache and an output directory of its own."""
    port, running = _free_port(), []
    for node in range(nodes):
        home = directory / f"node{node}"
        home.mkdir(parents=True)
        values = [{"directory": str(home), "callback": {"batch_size": 4}, **places}]
        spread = [f"--nnodes={nodes}", f"--node_rank={node}", f"--nproc_per_node={processes}"]
        own = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": environment["HF_ENDPOINT"]}
        running.append(start(torchrun("ddp", values, nodes * processes, spread, port), **{**environment, **own}))
    runs = []
    for node, process in enumerate(running):
        code, output = finish(process, 300)
        ranks = read_ranks(directory / f"node{node}")
        assert code == 0 and len(ranks) == processes, output[-8000:]
        runs.append(Run(directory / f"node{node}", ranks))
    return runs


def torchrun(
    mode: str,
    cases: list[dict[str, Any]],
    world: int,
    spread: Sequence[str] = (),
    port: int | None = None,
) -> list[str]:
    """Returns the command that runs cases in `world` processes, by default all of them here."""
    values = {"mode": mode, "world": world, "shim": mode in SHIMMED, "cases": cases}
    command = [sys.executable, "-m", "torch.distributed.run", *(spread or [f"--nproc_per_node={world}"])]
    command += ["--master_addr=127.0.0.1", f"--master_port={port or _free_port()}"]
    return [*command, "-m", "tests.distributed.worker", json.dumps(values)]


def start(command: list[str], **environment: str) -> subprocess.Popen:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Scores kept by an earlier run would hide what a run does itself.
    quiet |= {"MASHUP_CACHE": "", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Returns exit code and output of a launcher, after that many seconds at the latest."""
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
    return process.returncode, output


def read_ranks(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("rank*.json"))
    return [json.loads(file.read_text()) for file in files]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
