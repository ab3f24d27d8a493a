"""Hundreds of public adapters: Mistral-7B-Instruct-v0.2 with Lots-of-LoRAs from the Hub. Needs a GPU."""

from dataclasses import replace
from pathlib import Path

from . import paper


MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
LIBRARY = "hub:author=Lots-of-LoRAs,limit={limit}"
LIMIT, LIMIT_FAST = 500, 20
# Nobody can train on every subset of hundreds.
ARMS = ("scratch", "mashup", "paper", "best_single", "random", "eva", "lora_ga")
TASKS = ("arc_easy", "commonsense_qa", "openbookqa", "piqa", "social_iqa", "winogrande")


class LotsOfLoras(paper.Paper):
    """The paper's benchmarks with a public library, the same for every target."""

    name = "lots_of_loras"
    rank = 16

    def __init__(self, *args, limit: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.limit = limit

    def adapter(self, task: str) -> None:
        """The library is on the Hub: no task has an adapter that is trained here."""

    def candidates(self, target: str) -> list[str]:
        return [LIBRARY.format(limit=self.limit)]

    def mashup(self, target, candidates=None, **settings):
        limits = {"max_candidates": self.limit, "max_download_gb": 100.0}
        return super().mashup(target, candidates, **{**limits, **settings})


def make(home: Path, fast: bool, model: str | None) -> LotsOfLoras:
    budget = replace(paper.FAST if fast else paper.FULL, arms=ARMS)
    budget = budget if fast else replace(budget, tasks=TASKS)
    rows = paper.TEST_ROWS_FAST if fast else paper.TEST_ROWS
    return LotsOfLoras(home, budget, model or MODEL, rows, limit=LIMIT_FAST if fast else LIMIT)
