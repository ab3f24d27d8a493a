"""What the tests break in one process of a run: the code under test, or the world around it."""

import contextlib
import functools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import mashup_callback.candidates.find
import mashup_callback.full.trainee
import mashup_callback.full.weights
import mashup_callback.guard
import mashup_callback.lora.source
import mashup_callback.model.parameters
import mashup_callback.pipeline
import mashup_callback.scoring
import mashup_callback.scoring.cache
import mashup_callback.scoring.evaluation
import mashup_callback.scoring.race
import mashup_callback.scoring.sample
import mashup_callback.swap
from mashup_callback.errors import AdapterError
from tests.kernels import FusedAttention, FusedMLP


_REPLACED: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def installed(fault: str | None, rank: int) -> Iterator[None]:
    """Breaks something, and mends it afterwards for the next case."""
    if fault is not None:
        FAULTS[fault](rank)
    yield
    while _REPLACED:
        setattr(*_REPLACED.pop())


def unreadable(rank: int) -> None:
    """Process 1 cannot read the tensors of one candidate."""

    def load(adapter: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and adapter.path.name == "trained-0":
            raise AdapterError("its file cannot be read (Input/output error)")
        return original(adapter, *args, **kwargs)

    original = _replace(mashup_callback.lora.source, "load_factors", load)


def missing(rank: int) -> None:
    """Process 1 does not have one candidate at all, be it an adapter or a full checkpoint."""

    def read(kind: str, path: Any) -> Any:
        if rank == 1 and path.name.endswith("-0"):
            raise AdapterError("its configuration is missing")
        return original[kind](path)

    readers = {kind: functools.partial(read, kind) for kind in mashup_callback.candidates.find._READERS}
    original = _replace(mashup_callback.candidates.find, "_READERS", readers)


def unsendable(rank: int) -> None:
    """Rows hold what cannot be sent to other processes."""

    def read(*args: Any) -> Any:
        return [{**row, "open": (item for item in ())} for row in original(*args)]

    original = _replace(mashup_callback.scoring.sample, "_read_rows", read)


def lost_in_swap(rank: int) -> None:
    """Process 1 cannot read what it writes into the model."""

    def tensor(self: Any, name: str) -> Any:
        if rank == 1 and "layers.1.mlp" in name:
            raise AdapterError("its file cannot be read (Input/output error)")
        return original(self, name)

    def swap(*args: Any) -> Any:
        nonlocal original
        original = _replace(mashup_callback.full.weights.CheckpointTensors, "__getitem__", tensor)
        return original_swap(*args)

    original: Any = None
    original_swap = _replace(mashup_callback.full.trainee, "swap", swap)


def another_cache(rank: int) -> None:
    """Process 1 keeps no scores."""
    directory = None if rank else Path(tempfile.mkdtemp())
    _replace(mashup_callback.scoring.cache, "_default_directory", lambda: directory)


def scoring_raises(rank: int) -> None:
    """Process 1 fails in scoring with something that no candidate is to blame for."""

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if rank == 1:
            raise KeyError("a defect on process 1")
        return original(*args, **kwargs)

    original = _replace(mashup_callback.scoring.race, "evaluate", evaluate)


def batch_raises(rank: int) -> None:
    """Process 1 fails on its rows, before the model sees them."""

    def losses(*args: Any, **kwargs: Any) -> Any:
        if rank == 1:
            raise RuntimeError("process 1 chokes on its rows")
        return original(*args, **kwargs)

    original = _replace(mashup_callback.scoring.LossMetric, "losses", losses)


def forward_raises(rank: int) -> None:
    """Process 1 fails in the middle of a forward pass, where the others need it."""

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 1 and not torch.is_grad_enabled():
            raise RuntimeError("a layer fails on process 1")
        return original(self, *args, **kwargs)

    original = _replace(LlamaMLP, "forward", apply)


def lost(rank: int) -> None:
    """The main process, which merges, finds one candidate gone after scoring."""

    def choose(*args: Any) -> Any:
        # Whatever was kept in memory is forgotten, and the file cannot be read any more.
        for score in args[2].scores:
            score.source.release()
        original_load.append(_replace(mashup_callback.lora.source, "load_factors", load))
        return original(*args)

    def load(adapter: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == 0 and adapter.path.name == "trained-0":
            raise AdapterError("it is gone")
        return original_load[0](adapter, *args, **kwargs)

    original_load: list[Any] = []
    original = _replace(mashup_callback.pipeline, "choose", choose)


def guard_refuses(rank: int) -> None:
    """The guard finds nothing better than a fresh initialization."""
    _replace(mashup_callback.guard, "_decide", lambda *args: "scratch")


def killed(rank: int) -> None:
    """Process 0 is killed while it scores."""

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    original = _replace(mashup_callback.scoring.race, "evaluate", evaluate)


def writes_on_main_only(rank: int) -> None:
    """Mutation: only process 0 writes, and nobody looks at what was written."""

    def write(*args: Any) -> None:
        if rank == 0:
            original(*args)

    original = _replace(mashup_callback.swap, "write_parameters", write)
    _replace(mashup_callback.swap, "_check_written", lambda *args: None)


def other_values(rank: int) -> None:
    """Each process writes something else."""

    def write(model: Any, values: Any) -> None:
        original(model, {name: value + rank for name, value in values.items()})

    def check(found: Any, values: Any) -> None:
        original_check(found, {name: value + rank for name, value in values.items()})

    original = _replace(mashup_callback.swap, "write_parameters", write)
    original_check = _replace(mashup_callback.swap, "_check_written", check)


def no_master(rank: int) -> None:
    """Mutation: the fp32 masters that ZeRO keeps are not written."""
    _replace(mashup_callback.model.parameters, "_has_master", lambda parameter: False)


def fused(rank: int) -> None:
    """Fused kernels compute attention and MLP, and no layer in these is called."""
    _replace(LlamaMLP, "forward", FusedMLP.forward)
    _replace(LlamaAttention, "forward", FusedAttention.forward)


def _replace(module: Any, name: str, value: Any) -> Any:
    original = getattr(module, name)
    _REPLACED.append((module, name, original))
    setattr(module, name, value)
    return original


FAULTS = {
    function.__name__: function
    for function in (
        unreadable,
        missing,
        unsendable,
        lost_in_swap,
        another_cache,
        scoring_raises,
        batch_raises,
        forward_raises,
        lost,
        guard_refuses,
        killed,
        writes_on_main_only,
        other_values,
        no_master,
        fused,
    )
}
