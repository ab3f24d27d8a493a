"""
What could make the start better: every variant of the merge, trained, against the default one.

    python recipes/benchmarks/choice.py --output-dir outputs/choice
    python recipes/benchmarks/choice.py --output-dir outputs/choice --targets last --seeds 1 --arms default fitted
    python recipes/benchmarks/choice.py --world smollm2-code --home outputs/leave_one_out/smollm2-code/world \
        --seeds 1 --steps 24 --learning-rate 2e-3 --sample-rows 64

Every arm begins from the same three candidates, those of the lowest loss, and trains on the same batches with the same
fresh adapter; `gain` is the default's test loss at the end less the arm's. `variants.py` says what each arm is. Runs
are kept in the output directory, and what is there is not run again. Of `stdlib` and `smollm2-code` the library must
be there, as `recipes/leave_one_out/run.py` trains it.
"""

import argparse
import dataclasses
import json
import os
import time
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from peft import get_peft_model
from torch import nn
from transformers import set_seed

from mashup_callback.lora import LoraUpdate, fit
from mashup_callback.model import linear_layers
from mashup_callback.trainee import find_trainee
from recipes.benchmarks.variants import ARMS, Case, Start
from recipes.leave_one_out.worlds import World, load_world
from recipes.leave_one_out.worlds.quickstart import TEST_SEED
from recipes.quickstart import world as quickstart


# A user has no scores of the target yet.
os.environ["MASHUP_CACHE"] = ""
TARGETS, HOME = ("smallest", "first", "units", "rising"), Path("outputs/world")
CONTROLS = {
    "fitted": "more_steps",
    "exact_frozen": "cut_frozen",
    "ties_shared": "ties_delta",
    "dare_ties_shared": "dare_ties_delta",
}


def trainee(case: Case, start: Start) -> nn.Module:
    """The base model with an adapter that begins as the arm wants it."""
    model = case.world.base_model()
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            if name in start.frozen:
                layer.weight += start.frozen[name].delta()
    set_seed(case.seed)
    model = get_peft_model(model, case.world.lora_config())
    if start.update is not None:
        found = find_trainee(model)
        found.write(LoraUpdate(fit(start.update, found.adapter)))
    return model


def train(case: Case, model: nn.Module, more_steps: int) -> float:
    """Trains on the arm's batches, and again on some of them where it has more steps; returns seconds a step."""
    with case.trainer(model) as trainer:
        trainer.args.max_steps += more_steps
        trainer.args.warmup_steps = max(1, trainer.args.max_steps // 10)
        set_seed(case.seed)
        started = time.perf_counter()
        trainer.train()
        return (time.perf_counter() - started) / trainer.args.max_steps


def run(case: Case, arm: str) -> dict:
    """One run: the test loss before and after training, and what the start cost."""
    started = time.perf_counter()
    start = ARMS[arm](case)
    seconds = time.perf_counter() - started
    model = trainee(case, start)
    before = test_loss(case, model)
    trained = train(case, model, start.more_steps)
    row = {"world": case.world.name, "task": case.task, "seed": case.seed, "arm": arm, "steps": case.steps}
    values = {"start": before, "final": test_loss(case, model), "cost": start.cost}
    return row | values | {"seconds": seconds, "step_seconds": trained, "note": start.note}


def test_loss(case: Case, model: nn.Module) -> float:
    """The world's metric on the test rows; of the quickstart, whose metric is accuracy, the NLL of the letter."""
    if not case.world.higher_is_better:
        return case.world.evaluate(model, case.task)
    rows = quickstart.rows(case.task, quickstart.TEST_ROWS, TEST_SEED, "test")
    return nn.functional.cross_entropy(*quickstart.answered(model, quickstart.load_tokenizer(), rows)).item()


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """
    One row a world and arm: the mean over tasks and seeds of the gain over the default and over the arm's own control,
    each with its standard error, and the number of runs that end worse than the default.
    """
    run = ["world", "steps", "task", "seed"]
    finals = runs.set_index([*run, "arm"])["final"]
    table = runs.assign(default="default", control=runs["arm"].map(CONTROLS), order=runs["arm"].map([*ARMS].index))
    for column, name in (("default", "gain"), ("control", "over_control")):
        table[name] = finals.reindex(pd.MultiIndex.from_frame(table[[*run, column]])).to_numpy() - table["final"]
    table["worse"] = table["gain"] < 0
    columns = {"start": ("start", "mean"), "final": ("final", "mean")}
    columns |= {"gain": ("gain", "mean"), "gain_se": ("gain", "sem"), "worse": ("worse", "sum")}
    columns |= {"over_control": ("over_control", "mean"), "over_control_se": ("over_control", "sem")}
    columns |= {"cost": ("cost", "mean"), "runs": ("gain", "size")}
    return table.sort_values("order").groupby(["world", "steps", "arm"], sort=False).agg(**columns).reset_index()


def prepared(name: str, home: Path, learning_rate: float | None) -> World:
    """The world, every arm at one learning rate."""
    world = load_world(name, home.absolute())
    if learning_rate:
        world.budget = dataclasses.replace(world.budget, learning_rate=learning_rate)
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="quickstart", choices=("quickstart", "stdlib", "smollm2-code"))
    parser.add_argument("--home", type=Path, default=HOME, help="the world's directory, with its library")
    parser.add_argument("--targets", nargs="+", help="tasks that are held out")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each task")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each run")
    parser.add_argument("--learning-rate", type=float, help="default: the world's")
    parser.add_argument("--sample-rows", type=int, default=256, help="half of them rank, fit and scale")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/choice"))
    options = parser.parse_args()
    world = prepared(options.world, options.home, options.learning_rate)
    targets = options.targets or (TARGETS if options.world == "quickstart" else world.budget.tasks)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    for seed, task in product(range(1, options.seeds + 1), targets):
        key = {"world": world.name, "task": task, "seed": seed, "steps": options.steps}
        found = {row["arm"] for row in done if key.items() <= row.items()}
        missing = [arm for arm in options.arms if arm not in found]
        case = Case(world, task, seed, options.steps, options.sample_rows) if missing else None
        for arm in missing:
            done.append(run(case, arm))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(done[-1], flush=True)
    table = summary(pd.DataFrame(done))
    table.round(4).to_csv(options.output_dir / "choice.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
