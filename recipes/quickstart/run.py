"""Holds one task out and trains it twice: from scratch, and from a mashup of the other seven adapters.

    python recipes/quickstart/run.py
    python recipes/quickstart/run.py --target first --seed 1 2 3      # mean and range of three seeds

Works offline on CPU. Writes the mashup's report and a plot of both accuracy curves to the output directory.
"""

import argparse
import math
import os
import time
from pathlib import Path
from statistics import fmean

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from mashup_callback import MashupCallback
from mashup_callback.sharing import style
from recipes.leave_one_out.figures import label_ends
from recipes.leave_one_out.tables import first_reach
from recipes.quickstart import world


Points = list[tuple[int, float]]
EVAL_EVERY = 10
TEST_SEED = 0


class AccuracyCurve(TrainerCallback):
    """Records the test accuracy every few steps. It draws no random number, so training is the same without it."""

    def __init__(self, target: str) -> None:
        self.tokenizer = world.load_tokenizer()
        self.rows = world.rows(target, world.TEST_ROWS, TEST_SEED, "test")
        self.points: Points = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._record(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % EVAL_EVERY == 0:
            self._record(model, state.global_step)

    def _record(self, model: torch.nn.Module, step: int) -> None:
        self.points.append((step, world.accuracy(model, self.tokenizer, self.rows)))


def train(target: str, seed: int, output_dir: Path, mashup: MashupCallback | None = None) -> Points:
    """Trains the target's adapter from one seed and returns its accuracy curve, in pairs of step and accuracy."""
    curve = AccuracyCurve(target)
    set_seed(seed)
    trainer = SFTTrainer(
        world.load_model(),
        args=world.training_arguments(output_dir, seed),
        train_dataset=world.rows(target, world.TRAIN_ROWS, seed),
        processing_class=world.load_tokenizer(),
        peft_config=world.lora_config(),
        # The mashup comes first: the curve's step 0 is then its start.
        callbacks=[mashup, curve] if mashup else [curve],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve.points


def mean(curves: list[Points]) -> Points:
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves, strict=True)]


def plot(scratch: list[Points], mashup: list[Points], target: str, path: Path) -> None:
    """Draws the mean of both curves over the seeds; the bands are the lowest and the highest seed."""
    finals = [mean(curves)[-1][1] for curves in (mashup, scratch)]
    title = f"Held-out task {target}: {finals[0]:.1%} from a mashup, {finals[1]:.1%} from scratch"
    figure, (axes,) = style.new_figure(title, (7.5, 4))
    for curves, color, line in ((scratch, style.GRAY, "--"), (mashup, style.BLUE, "-")):
        steps, values = [step for step, _ in curves[0]], [[value for _, value in points] for points in curves]
        axes.plot(*zip(*mean(curves), strict=True), line, color=color, linewidth=2.5)
        lowest, highest = zip(*[(min(found), max(found)) for found in zip(*values, strict=True)], strict=True)
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
    axes.axhline(finals[1], color=style.GRAY, linestyle=":", linewidth=1)
    seeds = f", mean and range of {len(mashup)} seeds" if len(mashup) > 1 else ""
    axes.set(xlabel="training step", ylabel=f"test accuracy{seeds}", ylim=(0, 1), xlim=(0, world.STEPS))
    ends = [("from a mashup", finals[0], style.BLUE, "-"), ("from scratch", finals[1], style.GRAY, "--")]
    label_ends(axes, ends)
    style.save(figure, path)


def summary(scratch: Points, mashup: Points) -> str:
    goal = scratch[-1][1]
    final = f"Final test accuracy: scratch {goal:.1%}, mashup {mashup[-1][1]:.1%} (chance 25%)."
    # On straight lines between evaluations.
    step = first_reach(*zip(*mashup, strict=True), goal)
    if step == math.inf:
        return f"{final}\nThe mashup run does not reach scratch's final accuracy in {world.STEPS} steps."
    return (
        f"{final}\nThe mashup run reaches scratch's final accuracy at step {step:.0f} of {world.STEPS} "
        f"({step / world.STEPS:.0%}), by linear interpolation between evaluations every {EVAL_EVERY} steps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smallest", choices=list(world.TASKS), help="the held-out task")
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="of both runs: initialization and data order")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    options = parser.parse_args()
    world.quiet()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    library = [os.path.relpath(world.ADAPTERS / task) for task in world.TASKS if task != options.target]
    path = options.output_dir / f"{options.target}.png"
    scratch, mashup = [], []
    for seed in options.seed:
        callback = MashupCallback(library, sample_size=256, seed=42)
        started = time.perf_counter()
        scratch.append(train(options.target, seed, options.output_dir))
        mashup.append(train(options.target, seed, options.output_dir, callback))
        report = callback.report
        print(f"Decision: {report.decision} ({report.reason}).")
        print(summary(scratch[-1], mashup[-1]))
        print(f"Mashup overhead {report.seconds:.1f} s, both runs {time.perf_counter() - started:.0f} s.")
        plot(scratch, mashup, options.target, path)
    if len(options.seed) > 1:
        print(f"Mean of {len(options.seed)} seeds. {summary(mean(scratch), mean(mashup))}")
    print(f"Curves: {path}")


if __name__ == "__main__":
    main()
