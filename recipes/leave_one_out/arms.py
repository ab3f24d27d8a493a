"""The arms: what training starts from. Each is one function from a job to what the Trainer is given."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from mashup_callback import MashupCallback

from .controls import RandomLikeMerge, eva, lora_ga
from .protocol import LIBRARY, Begin, Job, train
from .worlds import World


# What the paper's code does: averages of A and of B, and every candidate is scored on all 256 rows.
PAPER = {
    "top_k": 2,
    "merge_space": "factors",
    "metric": "token_accuracy",
    "sample_size": 512,
    "search": "exhaustive",
    "guard": False,
}
ORACLE_POOL, ORACLE_SIZE = 4, 3


def begin(world: World, job: Job, directory: Path) -> Begin:
    """Makes what an arm starts from; it may write to the directory, which is empty."""
    return ARMS[job.arm](world, job, directory)


def _fresh(world: World, *mashups: MashupCallback) -> Begin:
    return Begin(world.base_model(), world.lora_config(), list(mashups), list(mashups))


def scratch(world: World, job: Job, directory: Path) -> Begin:
    """A fresh LoRA initialization."""
    return _fresh(world)


def _mashup(**arm_settings: Any) -> Callable[[World, Job, Path], Begin]:
    def arm(world: World, job: Job, directory: Path) -> Begin:
        return _fresh(world, world.mashup(job.task, **{**arm_settings, **dict(job.settings)}))

    return arm


def everything(world: World, job: Job, directory: Path) -> Begin:
    """The merge of all candidates."""
    count = len(world.candidates(job.task))
    return _fresh(world, world.mashup(job.task, top_k=count, search="exhaustive", guard=False))


def form(world: World, job: Job, directory: Path) -> Begin:
    """An adapter with the form of an answer and no skill: from the other tasks' rows with answers drawn by lot."""
    adapter = world.adapter(f"format-{job.task}")
    return _fresh(world, world.mashup(job.task, [str(adapter)], top_k=1, guard=False))


def random(world: World, job: Job, directory: Path) -> Begin:
    """An adapter with the norms of the default merge and random directions."""
    result = _fresh(world)
    control = RandomLikeMerge(world, job, directory)
    result.callbacks, result.mashups = [control], control.mashups
    return result


def oracle(world: World, job: Job, directory: Path) -> Begin:
    """
    The best subset in hindsight, of those searched: every candidate alone, then every triple of the four best ones,
    each trained for `job.oracle_steps` steps and compared on the test rows. The search is charged.
    """
    spent, values = 0.0, {}

    def probe(subset: tuple[str, ...]) -> float:
        nonlocal spent
        start = _exactly(world, job, subset)
        points, _ = train(world, job, start, stop_after=job.oracle_steps)
        spent += start.overhead + points[-1].seconds
        values[subset] = points[-1].value if world.higher_is_better else -points[-1].value
        return values[subset]

    singles = sorted(((name,) for name in world.candidates(job.task)), key=probe, reverse=True)
    pool = [subset[0] for subset in singles[:ORACLE_POOL]]
    for subset in combinations(pool, min(ORACLE_SIZE, len(pool))):
        if subset not in values:
            probe(subset)
    best = max(values, key=values.__getitem__)
    result = _exactly(world, job, best)
    result.seconds, result.chosen = spent, tuple(Path(name).name for name in best)
    return result


def _exactly(world: World, job: Job, subset: tuple[str, ...]) -> Begin:
    # Nothing is selected here, so scoring gets as few rows as it takes.
    return _fresh(world, world.mashup(job.task, subset, top_k=len(subset), sample_size=2, guard=False))


ARMS: dict[str, Callable[[World, Job, Path], Begin]] = {
    LIBRARY: scratch,
    "scratch": scratch,
    "mashup": _mashup(),
    "paper": _mashup(**PAPER),
    "best_single": _mashup(top_k=1, guard=False),
    "random": random,
    "all": everything,
    "eva": eva,
    "lora_ga": lora_ga,
    "oracle": oracle,
    "format": form,
}
