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
    command = [sys.executable, "-m"]
    if world > 1:
        command += ["torch.distributed.run", f"--nproc_per_node={world}", "--master_addr=127.0.0.1"]
        command += [f"--master_port={_free_port()}", "-m"]
    command += ["tests.distributed.worker", json.dumps(values)]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    files = [directory / f"rank{rank}.json" for rank in range(world)]
    ranks = [json.loads(file.read_text()) for file in files if file.exists()]
    run = Run(ranks, done.returncode, done.stdout, time.monotonic() - started)
    assert not ok or (run.code == 0 and len(ranks) == world), run.output[-8000:]
    return run


def _environment() -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Scores kept by an earlier run would hide what a run does itself.
    return {**os.environ, **quiet, "MASHUP_CACHE": "", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
