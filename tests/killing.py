"""
Kills training runs and runs each again: `python -m tests.killing <settings as JSON>` prints what came of it as JSON.

Each run is a fork of this process, which has imported everything and built the trainers, so that it costs a second.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import mashup_callback.pipeline as pipeline
from mashup_callback import MashupCallback
from tests.full_model import full_trainer
from tests.tiny import llama, losses, save_random_adapter, sft_trainer


STAGES = ("find_candidates", "draw_sample", "score_candidates", "select", "choose", "check_swap", "save_mashup")
# Everything that changes a directory or begins to write a file passes one of these.
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate"}
Kill = Callable[[], None]


def save_library(directory: Path) -> None:
    """Three adapters and three full checkpoints that no guard is asked about."""
    for seed in range(3):
        save_random_adapter(directory / f"lora/run-{seed}", seed, scale=0.02)
        model = llama()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(directory / f"full/run-{seed}", max_shard_size="20KB")


class Runs:
    """
    Runs of one kind in one directory.

    Args:
        home (`Path`): Where library, output and caches are.
        kind (`str`): `"lora"`, `"full"`, `"download"` or `"two"` processes.
        specs (`list[str]`): The candidates.
    """

    def __init__(self, home: Path, kind: str, specs: list[str]) -> None:
        self.home, self.kind, self.specs = home, kind, specs
        self.output, self.earlier = home / "out", home / "earlier"
        self.processes = 2 if kind == "two" else 1
        self.trainers = {} if kind == "two" else {top_k: self.build(top_k) for top_k in (1, 2)}
        self.clear()
        self.run(1)
        shutil.copytree(self.output, self.earlier)
        self.clear()
        started = time.monotonic()
        self.expected = self.run(2)
        self.seconds = time.monotonic() - started

    def build(self, top_k: int) -> Any:
        callback = MashupCallback(self.specs, sample_size=8, top_k=top_k, guard=False, on_error="raise")
        make = full_trainer if self.kind == "full" else sft_trainer
        torch.manual_seed(0)
        return make(self.output, callbacks=[callback], max_steps=1), callback

    def clear(self) -> None:
        """Puts everything where the run begins: an earlier mashup is there, and no cache."""
        for name in ("out", "scores", "hf"):
            shutil.rmtree(self.home / name, ignore_errors=True)
        if self.earlier.exists():
            shutil.copytree(self.earlier, self.output)

    def begin(self, top_k: int, prepare: Kill | None = None) -> list[int]:
        """Starts a run and returns its processes; `prepare` is called in the first one of them."""
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        (self.home / "result.json").unlink(missing_ok=True)
        children = []
        for rank in range(self.processes):
            children.append(os.fork())
            if children[-1] == 0:
                self._child(top_k, rank, port, prepare)
        return children

    def _child(self, top_k: int, rank: int, port: int, prepare: Kill | None) -> None:
        code = 1
        try:
            if prepare is not None and rank == 0:
                prepare()
            if self.processes > 1:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "MASTER_PORT": port}
                where |= {"LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
                os.environ.update({name: str(value) for name, value in where.items()})
                AcceleratorState._reset_state(True), PartialState._reset_state(), GradientState._reset_state()
            trainer, callback = self.trainers.get(top_k) or self.build(top_k)
            trainer.train()
            report = callback.report
            rows = [[row.name, row.status, row.loss, row.weight] for row in report.candidates]
            found = {"decision": report.decision, "rows": rows, "losses": losses(trainer)}
            if rank == 0:
                (self.home / "result.json").write_text(json.dumps(found))
            code = 0
        finally:
            os._exit(code)

    def run(self, top_k: int) -> dict[str, Any]:
        """Runs to the end and returns what came of it."""
        codes = [os.waitpid(child, 0)[1] for child in self.begin(top_k)]
        assert codes == [0] * self.processes, f"a run of {self.kind} failed: {codes}"
        return json.loads((self.home / "result.json").read_text()) | {"files": self.files()}

    def files(self) -> dict[str, str] | None:
        """The hash of each file of the merge; None where there is none. The report has times in it."""
        directory = self.output / "mashup"
        if not directory.exists():
            return None
        paths = [path for path in directory.iterdir() if path.name.endswith(("safetensors", "config.json"))]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}

    def killed(self, how: str, prepare: Kill | None = None, after: float | None = None) -> dict[str, Any]:
        """Kills a run after a time or where `prepare` has it kill itself; returns what it left and what came next."""
        self.clear()
        earlier = self.files()
        children = self.begin(2, prepare)
        if after is not None:
            time.sleep(after)
            os.kill(random.choice(children), signal.SIGKILL)
        statuses = [os.waitpid(children[0], 0)[1]] if after is None else []
        if self.processes > 1:
            # What torchrun does to the others when one process ends.
            for child in children[len(statuses) :]:
                os.kill(child, signal.SIGKILL)
        statuses += [os.waitpid(child, 0)[1] for child in children[len(statuses) :]]
        left = self.files()
        names = {None: "nothing"} | {repr(earlier): "earlier", repr(self.expected["files"]): "new"}
        result = {"kind": self.kind, "how": how, "killed": any(map(os.WIFSIGNALED, statuses))}
        result["left"] = names.get(left and repr(left), f"half: {left}")
        return result | {"next": _difference(self.expected, self.run(2))}


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    return "same" if found == expected else f"expected {expected}, found {found}"


def at_stage(name: str) -> Kill:
    def prepare() -> None:
        setattr(pipeline, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))

    return prepare


def at_change(home: Path, number: int, count: Path | None = None) -> Kill:
    """Kills before the given change of a file or directory in `home`, or writes to `count` how many there are."""

    def prepare() -> None:
        seen = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            if not (event in CHANGES or (event == "open" and _writes(args))) or str(home) not in str(args[0]):
                return
            seen += 1
            if count is not None and str(args[0]) != str(count):
                os.truncate(descriptor, seen)
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        descriptor = os.open(count, os.O_CREAT | os.O_RDWR) if count is not None else -1
        sys.addaudithook(hook)

    return prepare


def _writes(args: tuple) -> bool:
    return bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def kills(runs: Runs, times: int, every: int, stages: int) -> Iterator[dict[str, Any]]:
    """At random times, at every so many changes of the disk, and at the beginning of so many stages."""
    for _ in range(times):
        after = random.uniform(0, 1.05 * runs.seconds)
        yield runs.killed(f"after {after:.2f} s", after=after)
    for stage in STAGES[:stages]:
        yield runs.killed(stage, at_stage(stage))
    if not every:
        return
    # The number of changes goes by the length of this file, which takes no change to write.
    counter = runs.home.parent / "changes"
    runs.clear()
    for child in runs.begin(2, at_change(runs.home, 0, counter)):
        os.waitpid(child, 0)
    for number in range(1, counter.stat().st_size + 1, every):
        yield runs.killed(f"change {number}", at_change(runs.home, number))


def main(directory: str, seed: int, kinds: dict[str, dict[str, int]], hub: list[str]) -> None:
    home = Path(directory)
    random.seed(seed)
    os.environ["MASHUP_CACHE"] = str(home / "scores")
    found = []
    for kind, amounts in kinds.items():
        folder = "full" if kind == "full" else "lora"
        specs = hub if kind == "download" else [str(home / "library" / folder / "run-*")]
        shutil.rmtree(home / "earlier", ignore_errors=True)
        found += kills(Runs(home, kind, specs), **amounts)
        print(f"{kind} done", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
