"""Holds one task out and trains it twice: from scratch, and from a mashup of the other seven adapters.

    python recipes/quickstart/run.py
    python recipes/quickstart/run.py --target first --seed 2

Works offline on CPU. Writes the mashup's report and a plot of both accuracy curves to the output directory.
"""

import argparse
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import world
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from mashup_callback import MashupCallback


EVAL_EVERY = 10
TEST_SEED = 0


class AccuracyCurve(TrainerCallback):
    """Records the test accuracy every few steps. It draws no random number, so training is the same without it."""

    def __init__(self, target: str) -> None:
        self.tokenizer = world.load_tokenizer()
        self.rows = world.rows(target, world.TEST_ROWS, TEST_SEED, "test")
        self.points: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._record(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % EVAL_EVERY == 0:
            self._record(model, state.global_step)

    def _record(self, model: torch.nn.Module, step: int) -> None:
        self.points.append((step, world.accuracy(model, self.tokenizer, self.rows)))


def train(target: str, seed: int, output_dir: Path, mashup: MashupCallback | None = None) -> list[tuple[int, float]]:
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


def step_to_reach(points: list[tuple[int, float]], accuracy: float) -> float | None:
    """The first step at which the curve reaches `accuracy`, on straight lines between its points; None if never."""
    before = None
    for step, value in points:
        if value >= accuracy:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = step, value
    return None


def plot(curves: dict[str, list[tuple[int, float]]], target: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.axhline(curves["scratch"][-1][1], color="grey", linestyle=":", label="final accuracy of scratch")
    axes.set(xlabel="training step", ylabel="test accuracy", ylim=(0, 1), title=f"Held-out task: {target}")
    axes.legend()
    figure.savefig(path, dpi=150)


def summary(scratch: list[tuple[int, float]], mashup: list[tuple[int, float]]) -> str:
    goal = scratch[-1][1]
    final = f"Final test accuracy: scratch {goal:.1%}, mashup {mashup[-1][1]:.1%} (chance 25%)."
    step = step_to_reach(mashup, goal)
    if step is None:
        return f"{final}\nThe mashup run does not reach scratch's final accuracy in {world.STEPS} steps."
    return (
        f"{final}\nThe mashup run reaches scratch's final accuracy at step {step:.0f} of {world.STEPS} "
        f"({step / world.STEPS:.0%}), by linear interpolation between evaluations every {EVAL_EVERY} steps."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smallest", choices=list(world.TASKS), help="the held-out task")
    parser.add_argument("--seed", type=int, default=1, help="seed of both runs: initialisation and data order")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    options = parser.parse_args()
    world.quiet()
    options.output_dir.mkdir(parents=True, exist_ok=True)

    library = [os.path.relpath(world.ADAPTERS / task) for task in world.TASKS if task != options.target]
    callback = MashupCallback(library, top_k=3, seed=42)
    started = time.perf_counter()
    scratch = train(options.target, options.seed, options.output_dir)
    mashup = train(options.target, options.seed, options.output_dir, callback)

    path = options.output_dir / f"{options.target}.png"
    plot({"scratch": scratch, "mashup": mashup}, options.target, path)
    report = callback.report
    print(f"Decision: {report.decision} ({report.reason}).")
    print(summary(scratch, mashup))
    print(f"Mashup overhead {sum(report.timings.values()):.1f} s, both runs {time.perf_counter() - started:.0f} s.")
    print(f"Curves: {path}")


if __name__ == "__main__":
    main()
