"""What the processes of one training run share: who does what, and what they agree on."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


Item = TypeVar("Item")
Result = TypeVar("Result")


def is_main_process() -> bool:
    """Whether this process is the one that writes files and shows tables."""
    return PartialState().is_main_process


def deal(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """
    Applies a function to every item, each on one process, and returns all results on all processes.

    Args:
        function (`Callable`):
            Returns something that can be pickled, and raises nothing.
        items (`Sequence`):
            The same on every process.

    Returns:
        `list`: The results in the order of the items.
    """
    state = PartialState()
    mine = {index: function(items[index]) for index in range(state.process_index, len(items), state.num_processes)}
    if state.num_processes == 1:
        return [mine[index] for index in range(len(items))]
    everyone = {index: result for part in gather_object([mine]) for index, result in part.items()}
    return [everyone[index] for index in range(len(items))]


def agreed(value: Any) -> Any:
    """Returns the main process's value on every process."""
    return broadcast_object_list([value])[0]
