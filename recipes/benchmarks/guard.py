"""
Would the guard choose better after a few steps of training? Measured on the worlds of recipes/leave_one_out.

    python recipes/benchmarks/guard.py --csv guard.csv                      # quickstart: 8 tasks, 2 seeds
    python recipes/benchmarks/guard.py --world stdlib --tasks asyncio http --csv guard.csv

The fresh initialization, the best single candidate and the merge of three are each trained to the end, and their loss
on held-out rows is kept after a few steps. From these runs follows what a guard that trains all three for a few steps
would have chosen, and its regret: the test loss of its choice after training, less that of the best of the three. The
weakest of the three leaves after half of the steps. A control trains longer instead. A run that is done is kept, and a
study that was killed goes on.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback, set_seed

from mashup_callback.model.isolation import undisturbed
from mashup_callback.scoring import SampleRows, evaluate
from recipes.benchmarks.samples import quickstart_rows, sample_of
from recipes.leave_one_out.protocol import Begin, Job, train
from recipes.leave_one_out.worlds import World, load_world


HOME = Path("~/.cache/mashup_callback_recipes/leave_one_out").expanduser()
STARTS = {"fresh": 0, "single": 1, "merge": 3}
GUARD_STEPS = (4, 8, 16)
WATCHED = (0, 2, 4, 8, 16)
# The control: what is ahead before training, trained for as many steps more as sixteen steps from each start cost.
LONGER, MORE = "30% more steps", 1.3
TEST_ROWS = 512
RULE = ["world", "learning_rate", "guard_steps", "rule"]

# What is kept of the runs of one task and seed, by their start.
Starts = dict[str, dict]
Choice = Callable[[Starts], str]


class Watch(TrainerCallback):
    """Keeps the held-out loss after the first steps, and the seconds that this took after the first time."""

    def __init__(self, rows: SampleRows) -> None:
        self.rows, self.losses, self.spent = rows, {}, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._look(model, 0)
        self.spent = 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in WATCHED:
            self._look(model, state.global_step)

    def _look(self, model, step: int) -> None:
        started = time.monotonic()
        self.losses[step] = loss(model, self.rows)
        self.spent += time.monotonic() - started


def loss(model, rows: SampleRows) -> float:
    with undisturbed(model):
        return evaluate(model, rows).mean_loss


def run(world: World, task: str, seed: int, rate: float, start: str, steps: int) -> dict:
    """Trains from one start to the end."""
    watch, count = Watch(held_out_rows(world, task)), STARTS[start]
    with tempfile.TemporaryDirectory() as directory:
        settings = {"top_k": count, "guard": False, "search": "exhaustive", "report_dir": directory}
        mashups = [world.mashup(task, **settings)] if count else []
        begin = Begin(world.base_model(), world.lora_config(), mashups, [*mashups, watch])
        points, model = train(world, Job(world.name, task, start, seed, rate, steps, steps), begin)
    # The quickstart's own measure is accuracy, which tells less than a loss.
    is_loss = world.name != "quickstart"
    seconds = (points[-1].seconds - watch.spent) / steps
    return {
        "world": world.name,
        "task": task,
        "seed": seed,
        "learning_rate": rate,
        "start": start,
        "steps": steps,
        "losses": watch.losses,
        "end": points[-1].value if is_loss else loss(model, quickstart_test(task)),
        # Of one evaluation, in training steps.
        "evaluation": watch.spent / (len(WATCHED) - 1) / seconds,
        "chosen": [Path(row.name).name for row in mashups[0].report.candidates if row.weight] if mashups else [],
    }


@cache
def held_out_rows(world: World, task: str) -> SampleRows:
    """As many rows as the guard has by default, drawn apart from those that are trained on."""
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"steps": world.steps(task), "learning_rate": 1e-3, "peft_config": world.lora_config()}
        trainer = world.trainer(world.base_model(), task, 1000, Path(directory), **sizes)
        set_seed(1000)
        return sample_of(trainer, 256).held_out


@cache
def quickstart_test(task: str) -> SampleRows:
    """Test rows of the quickstart in the form that the Trainer gives them."""
    return quickstart_rows(task, 2 * TEST_ROWS, "test").held_out


def predicted(found: dict, steps: int, extrapolate: bool) -> float:
    """The loss by which a start is judged: after `steps` steps, or that on a line in log(steps) to the run's end."""
    losses = {int(step): loss for step, loss in found["losses"].items()}
    if not extrapolate:
        return losses[steps]
    slope = (losses[steps] - losses[steps // 2]) / math.log(2)
    return losses[steps] + slope * math.log(found["steps"] / steps)


def choose(starts: Starts, steps: int, extrapolate: bool = False) -> str:
    """What the guard would choose: the weakest leaves after half of the steps, the better of two at the end."""
    half = steps // 2
    done = [start for start in STARTS if start in starts]
    left = sorted(done, key=lambda start: predicted(starts[start], half, False))[: 2 if steps else 3]
    return min(left, key=lambda start: predicted(starts[start], steps, extrapolate))


def cost(starts: Starts, steps: int) -> float:
    """Training steps, and evaluations in their unit, beyond those of a guard that does not train."""
    if not steps:
        return 0.0
    evaluation = statistics.median(found["evaluation"] for found in starts.values())
    return 3 * (steps // 2) + 2 * (steps - steps // 2) + 5 * evaluation


def rules() -> Iterator[tuple[int, str, Choice]]:
    """Every way to choose, with the steps that it trains; a guard that trains none comes first."""
    for steps in (0, *GUARD_STEPS):
        yield steps, "held-out loss", partial(choose, steps=steps)
    for steps in GUARD_STEPS:
        yield steps, "extrapolated", partial(choose, steps=steps, extrapolate=True)
    yield 0, LONGER, lambda starts: LONGER
    for start in STARTS:
        yield 0, f"always {start}", lambda starts, start=start: start


def table(results: list[dict]) -> pd.DataFrame:
    """One row for each world, learning rate and rule, over the runs that have a single candidate and a merge."""
    groups: dict[tuple, Starts] = {}
    for found in results:
        key = tuple(found[name] for name in ("world", "learning_rate", "task", "seed"))
        groups.setdefault(key, {})[found["start"]] = found
    complete = {key: starts for key, starts in groups.items() if starts.keys() >= {"single", "merge"}}
    choices = [
        dict(zip((*RULE, "task"), (world, rate, steps, rule, task), strict=True)) | measured(starts, steps, chosen)
        for steps, rule, choice in rules()
        for (world, rate, task, _), starts in complete.items()
        if (chosen := choice(starts)) in starts
    ]
    return summary(pd.DataFrame(choices))


def measured(starts: Starts, steps: int, chosen: str) -> dict:
    """The regret of a choice, its gain over a guard that trains none, and its cost."""
    lost, own = regret(starts, chosen), starts["single"]["steps"]
    spent = cost(starts, steps) + starts[chosen]["steps"] - own
    return {"regret": lost, "gain": regret(starts, choose(starts, 0)) - lost, "cost": spent, "share": spent / own}


def summary(choices: pd.DataFrame) -> pd.DataFrame:
    """Means over runs; those of the gain, with their standard error, are over tasks."""
    choices = choices.assign(best=choices["regret"] == 0, better=choices["gain"] > 0, worse=choices["gain"] < 0)
    by_task = choices.groupby([*RULE, "task"])["gain"].mean().groupby(level=RULE)
    columns = {"runs": ("regret", "size"), "best_chosen": ("best", "sum"), "regret": ("regret", "mean")}
    columns |= {"better": ("better", "sum"), "worse": ("worse", "sum")}
    columns |= {"cost_steps": ("cost", "mean"), "share_of_run": ("share", "mean")}
    found = choices.groupby(RULE, sort=False).agg(**columns)
    found.insert(3, "gain", by_task.mean())
    found.insert(4, "gain_se", by_task.sem())
    digits = {"regret": 4, "gain": 4, "gain_se": 4, "cost_steps": 1, "share_of_run": 3}
    return found.round(digits).reset_index()


def regret(starts: Starts, choice: str) -> float:
    """Test loss after training from a start, less that of the best of those that were trained as long."""
    return starts[choice]["end"] - min(found["end"] for start, found in starts.items() if start in STARTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="quickstart")
    parser.add_argument("--home", type=Path, help="where the world keeps its base model and library")
    parser.add_argument("--tasks", nargs="+", help="default: all of the world's")
    parser.add_argument("--starts", nargs="+", choices=[*STARTS, LONGER], default=[*STARTS, LONGER])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--learning-rate", type=float, help="default: the world's")
    parser.add_argument("--output", type=Path, default=Path("guard"), help="a directory for what is done")
    parser.add_argument("--csv", type=Path, help="write the table of everything in --output here")
    options = parser.parse_args()
    world = load_world(options.world, options.home or HOME / options.world / "world")
    world.prepare()
    options.output.mkdir(parents=True, exist_ok=True)
    rate = options.learning_rate or world.budget.learning_rate
    for seed, task, start in product(options.seeds, options.tasks or world.budget.tasks, options.starts):
        name = f"{world.name}-{rate:g}-{task}-{seed}"
        path = options.output / f"{name}-{start.replace(' ', '-')}.json"
        if path.exists():
            continue
        steps, origin = world.steps(task), start
        if start == LONGER:
            paths = {other: options.output / f"{name}-{other}.json" for other in STARTS}
            done = {other: json.loads(path.read_text()) for other, path in paths.items() if path.exists()}
            steps, origin = round(MORE * steps), choose(done, 0)
        found = run(world, task, seed, rate, origin, steps) | {"start": start}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(task, seed, start, found["losses"], round(found["end"], 4), found["chosen"], flush=True)
    results = [json.loads(path.read_text()) for path in sorted(options.output.glob("*.json"))]
    rows = table(results)
    print(rows.to_string(index=False))
    if options.csv:
        rows.to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
