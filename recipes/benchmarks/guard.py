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
import csv
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path

from transformers import TrainerCallback, set_seed
from trl import SFTTrainer


sys.path.insert(0, str(Path(__file__).parents[2]))
from mashup_callback.model.isolation import undisturbed
from mashup_callback.scoring import SampleRows, draw_sample, evaluate
from recipes.leave_one_out.worlds import World, load_world
from recipes.quickstart import world as quickstart


HOME = Path("~/.cache/mashup_callback_recipes/leave_one_out").expanduser()
STARTS = {"fresh": 0, "single": 1, "merge": 3}
GUARD_STEPS = (4, 8, 16)
WATCHED = (0, 2, 4, 8, 16)
# The control: what is ahead before training, trained for as many steps more as sixteen steps from each start cost.
LONGER, MORE = "30% more steps", 1.3
TEST_ROWS = 512

# What is kept of the runs of one task and seed, by their start.
Starts = dict[str, dict]
Choice = Callable[[Starts], str]


class Watch(TrainerCallback):
    """Keeps the held-out loss after the first steps, and the time of a step and of an evaluation."""

    def __init__(self, rows: SampleRows) -> None:
        self.rows, self.losses, self.spent = rows, {}, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._look(model, 0)
        self.started, self.spent = time.monotonic(), 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step in WATCHED:
            self._look(model, state.global_step)

    def _look(self, model, step: int) -> None:
        started = time.monotonic()
        with undisturbed(model):
            self.losses[step] = evaluate(model, self.rows).mean_loss
        self.spent += time.monotonic() - started


def run(world: World, task: str, seed: int, rate: float, start: str, steps: int) -> dict:
    """Trains from one start to the end."""
    count = STARTS[start]
    with tempfile.TemporaryDirectory() as directory:
        watch = Watch(held_out_rows(world, task))
        settings = {"top_k": count, "guard": False, "search": "exhaustive", "report_dir": directory}
        mashups = [world.mashup(task, **settings)] if count else []
        trainer = trainer_for(world, task, seed, directory, steps, rate, [*mashups, watch])
        trainer.train()
        seconds = (time.monotonic() - watch.started - watch.spent) / steps
        return {
            "world": world.name,
            "task": task,
            "seed": seed,
            "learning_rate": rate,
            "start": start,
            "steps": steps,
            "losses": watch.losses,
            "end": test_loss(world, trainer.model, task),
            # Of one evaluation, in training steps.
            "evaluation": watch.spent / (len(WATCHED) - 1) / seconds,
            "chosen": [Path(row.name).name for row in mashups[0].report.candidates if row.weight] if mashups else [],
        }


def trainer_for(world: World, task: str, seed: int, directory: str, steps: int, rate: float, callbacks: list):
    """Makes the world's Trainer; the same fresh adapter and order of the data for every start."""
    set_seed(seed)
    settings = {"steps": steps, "learning_rate": rate, "peft_config": world.lora_config(), "callbacks": callbacks}
    trainer = world.trainer(world.base_model(), task, seed, Path(directory), **settings)
    set_seed(seed)
    return trainer


@cache
def held_out_rows(world: World, task: str) -> SampleRows:
    """As many rows as the guard has by default, drawn apart from those that are trained on."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_for(world, task, 1000, directory, world.steps(task), 1e-3, [])
        batch_size = trainer.args.train_batch_size
        return draw_sample(trainer.get_train_dataloader(), 256, batch_size=batch_size).held_out


def test_loss(world: World, model, task: str) -> float:
    """The world's own measure where that is a loss; accuracy tells less."""
    if world.name != "quickstart":
        return world.evaluate(model, task)
    with undisturbed(model):
        return evaluate(model, quickstart_test(task)).mean_loss


@cache
def quickstart_test(task: str) -> SampleRows:
    """Test rows of the quickstart in the form that the Trainer gives them."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            quickstart.load_model(),
            args=quickstart.training_arguments(directory, 0),
            train_dataset=quickstart.rows(task, 2 * TEST_ROWS, 0, "test"),
            processing_class=quickstart.load_tokenizer(),
        )
        return draw_sample(trainer.get_train_dataloader(), 2 * TEST_ROWS, batch_size=64).held_out


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


def table(results: list[dict]) -> list[dict]:
    """One row for each world, learning rate and rule."""
    worlds: dict[tuple, dict[tuple, Starts]] = {}
    for found in results:
        runs = worlds.setdefault((found["world"], found["learning_rate"]), {})
        runs.setdefault((found["task"], found["seed"]), {})[found["start"]] = found
    rows = []
    for (world, rate), runs in worlds.items():
        complete = [starts for starts in runs.values() if starts.keys() >= {"single", "merge"}]
        for steps, rule, choice in rules():
            measurable = [starts for starts in complete if choice(starts) in starts]
            if measurable:
                where = {"world": world, "learning_rate": rate, "guard_steps": steps, "rule": rule}
                rows.append(where | measured(measurable, steps, choice))
    return rows


def measured(runs: list[Starts], steps: int, choice: Choice) -> dict:
    """The regret of a rule, and its gain over a guard that trains none, with the standard error over tasks."""
    regrets = [regret(starts, choice(starts)) for starts in runs]
    costs = [cost(starts, steps) + starts[choice(starts)]["steps"] - starts["single"]["steps"] for starts in runs]
    gains = [regret(starts, choose(starts, 0)) - value for starts, value in zip(runs, regrets, strict=True)]
    by_task: dict[str, list[float]] = {}
    for starts, gain in zip(runs, gains, strict=True):
        by_task.setdefault(starts["single"]["task"], []).append(gain)
    means = [statistics.mean(values) for values in by_task.values()]
    return {
        "runs": len(runs),
        "best_chosen": sum(value == 0 for value in regrets),
        "regret": round(statistics.mean(regrets), 4),
        "gain": round(statistics.mean(means), 4),
        "gain_se": round(statistics.stdev(means) / math.sqrt(len(means)), 4) if len(means) > 1 else math.nan,
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
        "cost_steps": round(statistics.mean(costs), 1),
        "share_of_run": round(statistics.mean(costs) / runs[0]["single"]["steps"], 3),
    }


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
    print(*(", ".join(f"{name} {value}" for name, value in row.items()) for row in rows), sep="\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
