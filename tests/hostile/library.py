"""A library of 200 adapters of which 150 are hostile."""

from pathlib import Path

from tests.hostile.cases import CASES
from tests.hostile.judging import good_adapter
from tests.tiny import save_scaled_adapter


HOSTILE = [case for case in CASES if case.base == "adapter" and case.reason and not (case.either or case.later)]
HOSTILE = [case for case in HOSTILE if case.size is None]
COUNT, GOOD = 200, 50


def save_library(directory: Path, trained: Path) -> None:
    """Saves hostile adapters, and among them some like the trained ones, as `<number>-good`."""
    # Evenly over the collection, so that each kind is there.
    chosen = [HOSTILE[index * len(HOSTILE) // (COUNT - GOOD)] for index in range(COUNT - GOOD)]
    for number in range(COUNT):
        if number % 4 == 3:
            source, factor = trained / f"trained-{number // 4 % 3}", 1 - number / 300
            save_scaled_adapter(directory / f"{number:03d}-good", source, factor)
        else:
            path = directory / f"{number:03d}-hostile"
            good_adapter(path)
            chosen.pop().change(path)
