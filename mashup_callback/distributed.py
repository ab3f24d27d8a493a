"""
What the processes of one training run share: who does what, and what they agree on.

Every message goes through [`gather`], and every process that fails inside [`failing_together`] sends its failure with
the same call. So the processes stay in step: whatever the others wait for, they get the failure instead and raise it.
"""

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import OutOfStepError


logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _RemoteFailure(Exception):  # noqa: N818
    """Carries what failed on other processes out of a gather."""

    def __init__(self, rank: int, kind: type[Exception], message: str) -> None:
        super().__init__(message)
        self.rank, self.kind = rank, kind

    def error(self) -> Exception:
        message = f"process {self.rank}: {self}"
        try:
            return self.kind(message)
        except TypeError:
            return RuntimeError(f"{self.kind.__name__} on {message}")


def is_main_process() -> bool:
    """Whether this process is the one that writes files and shows tables."""
    return PartialState().is_main_process


def is_first_on_machine() -> bool:
    """Whether this process is the one of its machine that downloads."""
    return PartialState().is_local_main_process


def process_index_and_count() -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    state = PartialState()
    return state.process_index, state.num_processes


def gather(value: Result) -> list[Result]:
    """Returns every process's value, which can be pickled, its tensors on the CPU, in the order of the processes."""
    if PartialState().num_processes == 1:
        return [value]
    parcels = gather_object([(None, value)])
    failures = [(rank, failure) for rank, (failure, _) in enumerate(parcels) if failure is not None]
    if failures:
        rank, (kind, message) = failures[0]
        raise _RemoteFailure(rank, kind, message)
    return [value for _, value in parcels]


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Context that every process enters and leaves together: what fails on one of them is raised on all.

    Raises:
        Exception: What failed here, or an error of the same type that names the process where it failed.
        OutOfStepError: As is, without the others.
    """
    try:
        yield
        gather(None)
    except OutOfStepError:
        raise
    except _RemoteFailure as failure:
        raise failure.error() from failure
    except Exception as error:
        if PartialState().num_processes > 1:
            logger.warning("Process %d failed: %s: %s", PartialState().process_index, type(error).__name__, error)
            gather_object([(_sendable(error), None)])
        raise


def _sendable(error: Exception) -> tuple[type[Exception], str]:
    """Returns the class and the message of an error, in another class where other processes cannot be sent its own."""
    try:
        pickle.dumps(type(error))
    except Exception:
        return RuntimeError, f"{type(error).__name__}: {error}"
    return type(error), str(error)


def from_main_process(value: Result) -> Result:
    """Returns the main process's value, which can be pickled, on every process."""
    if PartialState().num_processes == 1:
        return value
    # Before the others wait for it: what cannot be pickled fails here.
    parcel = pickle.dumps(value) if is_main_process() else None
    gather(None)
    [parcel] = broadcast_object_list([parcel])
    return value if is_main_process() else pickle.loads(parcel)


def on_main_process(function: Callable[[], Result]) -> Result:
    """Calls a function on the main process only and returns its result on every process."""
    return from_main_process(function() if is_main_process() else None)


def local_main_first(function: Callable[[], Result]) -> Result:
    """Calls a function on one process of each machine first, then on the others: they find what it has downloaded."""
    first = is_first_on_machine()
    result = function() if first else None
    gather(None)
    return result if first else function()
