"""Writing into the live model in place: read back, compared between the processes, and put back where that fails."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from .distributed import failing_together, gather
from .model import stream_parameters, write_parameters


def swap(model: nn.Module, values: Mapping[str, torch.Tensor], undo: Callable[[], None]) -> None:
    """
    Fills parameters on every process, and reads them back; a whole tensor is looked up when its turn comes.

    If the write fails on any process, or what a process reads is not what the others read, all of them call `undo`.
    """
    try:
        with failing_together():
            write_parameters(model, values)
        # Reading a sharded model takes all processes.
        with failing_together():
            _check_written(stream_parameters(model, values), values)
    except BaseException:
        undo()
        raise


def _check_written(found: Iterable[tuple[str, torch.Tensor]], values: Mapping[str, torch.Tensor]) -> None:
    lost, digest = set(values), hashlib.sha256()
    for name, value in found:
        if torch.equal(value, values[name].to(value)):
            lost.discard(name)
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(values)} parameters do not hold the merge that was written (such as {min(lost)}). "
            "Something else writes to the model at the same time, or keeps its parameters in a way unknown here."
        )
    checksums = gather(digest.hexdigest())
    different = [rank for rank, other in enumerate(checksums) if other != checksums[0]]
    if different:
        raise RuntimeError(
            f"The weights written on the processes {different} differ from those of process 0. The processes must "
            "start from the same fresh adapter: set the same seed on all of them."
        )
