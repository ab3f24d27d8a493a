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

    limit = LIMIT

    def adapter(self, task: str) -> None:
        """The library is on the Hub: no task has an adapter that is trained here."""

    def candidates(self, target: str) -> list[str]:
        return [LIBRARY.format(limit=self.limit)]

    def mashup(self, target, candidates=None, **settings):
        limits = {"max_candidates": self.limit, "max_download_gb": 100.0}
        return super().mashup(target, candidates, **{**limits, **settings})


def make(home: Path, fast: bool, model: str | None) -> LotsOfLoras:
    sizes = (paper.FAST, paper.TEST_ROWS_FAST) if fast else (replace(paper.FULL, tasks=TASKS), paper.TEST_ROWS)
    world = LotsOfLoras(home, replace(sizes[0], arms=ARMS), model or MODEL, sizes[1])
    world.limit = LIMIT_FAST if fast else LIMIT
    return world
