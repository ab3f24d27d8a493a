"""Starts a training run in processes of its own and returns what each of them found."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.modes import SHIMMED


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """
    What came of a run.

    Args:
        ranks (`list[dict]`): What each process wrote; empty if the run failed.
        code (`int`): Exit code of the launcher.
        output (`str`): What the processes printed.
        seconds (`float`): How long it took.
    """

    ranks: list[dict[str, Any]]
    code: int
    output: str
    seconds: float

    @property
    def losses(self) -> list[float]:
        return self.ranks[0]["losses"]


def launch(
    directory: Path, library: Path, *, mode: str = "ddp", world: int = 2, ok: bool = True, **settings: Any
) -> Run:
    directory.mkdir(parents=True)
    values = {
        "mode": mode,
        "world": world,
        "shim": world > 1 and mode in SHIMMED,
        "directory": str(directory),
        "base": str(library.parent / "base"),
        "candidates": str(library / "*"),
        **settings,
    }
    started = time.monotonic()
    done = subprocess.run(
        torchrun(values, world),
        cwd=ROOT,
        env=_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    files = [directory / f"rank{rank}.json" for rank in range(world)]
    ranks = [json.loads(file.read_text()) for file in files if file.exists()]
    run = Run(ranks, done.returncode, done.stdout, time.monotonic() - started)
    assert not ok or (run.code == 0 and len(ranks) == world), run.output[-8000:]
    return run


def launch_nodes(
    directory: Path, library: Path, candidates: str, environment: dict[str, str], nodes: int = 2, processes: int = 2
) -> list[Run]:
    """Starts one torchrun a node; each node has a Hub cache, a user cache and an output directory of its own."""
    port, running = _free_port(), []
    world = nodes * processes
    started = time.monotonic()
    for node in range(nodes):
        home = directory / f"node{node}"
        home.mkdir(parents=True)
        values = {"mode": "ddp", "world": world, "shim": False, "directory": str(home), "candidates": candidates}
        values |= {"base": str(library.parent / "base"), "callback": {"batch_size": 4}}
        places = [f"--nnodes={nodes}", f"--node_rank={node}", f"--nproc_per_node={processes}"]
        own = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": environment["HF_ENDPOINT"]}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = torchrun(values, world, places=places, port=port)
        running.append(subprocess.Popen(command, cwd=ROOT, env={**environment, **_environment(), **own}, **streams))
    outputs = [process.communicate(timeout=300)[0] for process in running]
    runs = []
    for node, (process, output) in enumerate(zip(running, outputs, strict=True)):
        files = sorted((directory / f"node{node}").glob("rank*.json"))
        ranks = [json.loads(file.read_text()) for file in files]
        runs.append(Run(ranks, process.returncode, output, time.monotonic() - started))
        assert process.returncode == 0 and len(ranks) == processes, output[-8000:]
    return runs


def torchrun(
    values: dict[str, Any],
    world: int,
    worker: str = "worker",
    places: list[str] | None = None,
    port: int | None = None,
) -> list[str]:
    """Returns the command that starts a worker in `world` processes, by default all of them here, or alone."""
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", *(places or [f"--nproc_per_node={world}"]), "--master_addr=127.0.0.1"]
        command += [f"--master_port={port or _free_port()}", "-m"]
    return [*command, f"tests.distributed.{worker}", json.dumps(values)]


def _environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Scores kept by an earlier run would hide what a run does itself.
    return {**os.environ, **quiet, "MASHUP_CACHE": "", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
