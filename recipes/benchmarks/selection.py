"""
Which metric picks the best single start: the regret of each after training, on the quickstart world.

    python recipes/benchmarks/selection.py --json selection.json            # 8 targets, 3 seeds: 37 minutes on 2 cores
    python recipes/benchmarks/selection.py --seeds 1 --steps 40 --targets last units

Regret: held-out loss after training from the metric's choice, less that after training from the best choice in
hindsight. Every candidate is trained from, with the world's own hyper-parameters.
"""

import os


os.environ["MASHUP_CACHE"] = ""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from joblib import Parallel, delayed
from transformers import PrinterCallback, set_seed
from trl import SFTTrainer

from mashup_callback import MashupCallback, score_candidates
from mashup_callback.model.isolation import undisturbed
from mashup_callback.scoring import SampleRows, draw_sample, evaluate


sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import world


METRICS = ("loss", "token_accuracy", "probe")
TEST_ROWS = 256


def trainer_for(target: str, seed: int, steps: int, directory: str, start: Path | None = None) -> SFTTrainer:
    """A run on one task that starts from a past adapter, or from a fresh one."""
    set_seed(seed)
    settings = {"top_k": 1, "guard": False, "sample_size": 8, "report_dir": directory}
    trainer = SFTTrainer(
        world.load_model(),
        args=world.training_arguments(directory, seed, max_steps=steps),
        train_dataset=world.rows(target, world.TRAIN_ROWS, seed),
        processing_class=world.load_tokenizer(),
        peft_config=world.lora_config(),
        callbacks=[MashupCallback(str(start), **settings)] if start else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def choices(target: str, seed: int, library: list[Path]) -> dict[str, str]:
    """What each metric ranks first on the same 128 rows."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_for(target, seed, 1, directory)
        loader = trainer.get_train_dataloader()
        rows = draw_sample(loader, 256, batch_size=world.BATCH_SIZE, seed=seed).selection
        rate = world.LEARNING_RATE
        ranked = {
            metric: score_candidates(trainer.model, library, rows, metric, learning_rate=rate) for metric in METRICS
        }
    return {metric: scores[0].candidate.name for metric, scores in ranked.items()}


def final_loss(target: str, seed: int, steps: int, start: Path) -> float:
    """Test loss after training from one past adapter."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_for(target, seed, steps, directory, start)
        trainer.train()
        test = test_rows(target, directory)
        with undisturbed(trainer.model):
            return evaluate(trainer.model, test).mean_loss


def test_rows(target: str, directory: str) -> SampleRows:
    """The test rows in the form that the Trainer gives them."""
    trainer = SFTTrainer(
        world.load_model(),
        args=world.training_arguments(directory, 0),
        train_dataset=world.rows(target, TEST_ROWS, 0, "test"),
        processing_class=world.load_tokenizer(),
    )
    return draw_sample(trainer.get_train_dataloader(), TEST_ROWS, batch_size=64).held_out


def regrets(target: str, seed: int, steps: int) -> dict[str, str | int | float]:
    """One row of the study, measured in this process with one thread."""
    world.quiet()
    torch.set_num_threads(1)
    library = [world.ADAPTERS / task for task in world.TASKS if task != target]
    chosen = choices(target, seed, library)
    losses = {str(path): final_loss(target, seed, steps, path) for path in library}
    best = min(losses.values())
    found = {metric: losses[name] - best for metric, name in chosen.items()}
    found["mean of all"] = statistics.mean(losses.values()) - best
    picks = {metric: Path(name).name for metric, name in chosen.items()}
    hindsight = Path(min(losses, key=losses.get)).name
    print(f"{target}, seed {seed}: best {best:.4f} by {hindsight}; {picks}; {found}", flush=True)
    return {"target": target, "seed": seed, "hindsight": hindsight} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the regrets to this file")
    parser.add_argument("--targets", nargs="+", choices=list(world.TASKS), default=list(world.TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each target")
    parser.add_argument("--steps", type=int, default=world.STEPS, help="training steps of each run")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    rows = Parallel(n_jobs=options.jobs)(
        delayed(regrets)(target, seed, options.steps)
        for seed in range(1, options.seeds + 1)
        for target in options.targets
    )
    means = {name: statistics.mean(row[name] for row in rows) for name in (*METRICS, "mean of all")}
    print("mean regret:", {name: round(value, 4) for name, value in means.items()})
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "mean": means, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
