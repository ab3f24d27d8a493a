"""
What the processes of one training run share: who does what, and what they agree on.

Every message goes through [`exchange`], and every process that fails inside [`joint`] sends its failure with the same
call. So the processes stay in step: whatever the others wait for, they get the failure instead and raise it too.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import OutOfStepError


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class _RemoteFailure(Exception):  # noqa: N818
    """Carries what failed on other processes out of an exchange."""

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


def place() -> tuple[int, int]:
    """Returns the index of this process and the number of processes."""
    state = PartialState()
    return state.process_index, state.num_processes


def exchange(value: Result) -> list[Result]:
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
def joint() -> Iterator[None]:
    """
    Context that every process enters and leaves together: what fails on one of them is raised on all.

    Raises:
        Exception: What failed here, or an error of the same type that names the process where it failed.
        OutOfStepError: As is, without the others.
    """
    try:
        yield
        exchange(None)
    except OutOfStepError:
        raise
    except _RemoteFailure as failure:
        raise failure.error() from failure
    except Exception as error:
        if PartialState().num_processes > 1:
            logger.warning("Process %d failed: %s: %s", PartialState().process_index, type(error).__name__, error)
            gather_object([((type(error), str(error)), None)])
        raise


def agreed(value: Result) -> Result:
    """Returns the main process's value on every process."""
    exchange(None)
    return broadcast_object_list([value])[0]


def decided(function: Callable[[], Result]) -> Result:
    """Calls a function on the main process only and returns its result on every process."""
    return agreed(function() if is_main_process() else None)


def in_turns(function: Callable[[], Result]) -> Result:
    """Calls a function on one process of each machine first, then on the others: they find what it has downloaded."""
    first = is_first_on_machine()
    result = function() if first else None
    exchange(None)
    return result if first else function()


def deal(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """
    Applies a function to every item, each on one process, and returns all results on all processes.

    The items are the same on every process, and the results, in the order of the items, can be pickled.
    """
    rank, count = place()
    parts = exchange({index: function(items[index]) for index in range(rank, len(items), count)})
    everyone = {index: result for part in parts for index, result in part.items()}
    return [everyone[index] for index in range(len(items))]
