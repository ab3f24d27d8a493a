"""
What scoring costs: against the bare model, against peft, with many candidates, and in memory. Runs on the CPU:

    python recipes/benchmarks/score.py --json score.json
    python recipes/benchmarks/score.py --only racing growth

Throughput and the comparisons with peft are in throughput.py. Racing and growth: the quickstart world. Memory: a Llama
with 262,144 tokens, a batch of 16 rows of 512.
"""

import os


# A score that is kept would cost nothing.
os.environ["MASHUP_CACHE"] = ""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from trl import SFTTrainer

from mashup_callback import score_candidates
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.lora.merge import merge_factors
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.model.isolation import undisturbed
from mashup_callback.scoring import RowLosses, SampleRows, draw_sample, evaluate, round_sizes, survivors
from mashup_callback.sharing import style
from recipes.benchmarks.throughput import llama, throughput
from recipes.quickstart import world


CHECKPOINTS, NOISED, KEEP, SEEDS, POOL, SAMPLE = (0.2, 0.4, 0.6, 0.8), 14, 3, 20, 256, 128
GROWTH = (8, 32, 128, 512)
VOCABULARY, LONG_ROWS, LONG_LENGTH = 262_144, 16, 512
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"

console = Console()


def quickstart(target: str, size: int) -> tuple[nn.Module, SampleRows, SampleRows]:
    """The quickstart's base model, and a sample and held-out rows of one of its tasks as its Trainer sees them."""
    world.quiet()
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            world.load_model(),
            args=world.training_arguments(directory, 0),
            train_dataset=world.rows(target, 2 * size, 0),
            processing_class=world.load_tokenizer(),
        )
        sample = draw_sample(trainer.get_train_dataloader(), 2 * size, batch_size=world.BATCH_SIZE)
    return world.load_model().eval(), sample.selection, sample.held_out


def write_adapter(source: Path, directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    shutil.copy(source / CONFIG_NAME, directory)
    tensors = load_file(source / WEIGHTS_NAME)
    save_file({name: change(name, tensor).contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS_NAME)
    return directory


def candidates(directory: Path, target: str, count: int) -> list[tuple[Path, str]]:
    """
    Adapters with their training runs: the trained ones of the other tasks, scaled copies that stand for their earlier
    checkpoints, copies with noise, and random ones of a trained one's norms.
    """
    generator = torch.Generator().manual_seed(0)
    trained = sorted(path for path in world.ADAPTERS.iterdir() if path.name != target)
    found = [(path, path.name) for path in trained]
    for share in CHECKPOINTS:
        for path in trained:
            scaled = write_adapter(path, directory / f"{path.name}-{share}", _scale(share))
            found.append((scaled, path.name))
    while len(found) < count:
        path, place = trained[len(found) % len(trained)], len(found)
        noise = 0.3 if place % 64 < len(trained) * (1 + len(CHECKPOINTS)) + NOISED else None
        found.append((write_adapter(path, directory / str(place), _disturb(noise, generator)), str(place)))
    return found[:count]


def _scale(share: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, tensor: share * tensor if "lora_B" in name else tensor


def _disturb(noise: float | None, generator: torch.Generator) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        random = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        return (random if noise is None else tensor + noise * random).to(tensor.dtype)

    return change


def racing() -> dict[str, float]:
    """Races on 20 samples, replayed on the losses of all candidates on all rows, against an exhaustive search."""
    target = "last"
    model, pool, held_out = quickstart(target, POOL)
    with tempfile.TemporaryDirectory() as directory:
        found = candidates(Path(directory), target, 64)
        scores = score_candidates(model, [path for path, _ in found], pool)
        losses = {score.candidate.name: score.losses for score in scores}
        runs = {str(path): run for path, run in found}
        races = [_race(_sample(losses, seed), runs) for seed in range(SEEDS)]
        searches = [_top(_sample(losses, seed), runs) for seed in range(SEEDS)]
        same = [
            set(top) == set(best) or _near(model, held_out, top, best)
            for (top, _), best in zip(races, searches, strict=True)
        ]
    equal = sum(set(top) == set(best) for (top, _), best in zip(races, searches, strict=True))
    fraction = statistics.mean(seen for _, seen in races) / (64 * SAMPLE)
    console.print(f"racing: {fraction:.1%} of the rows; the same {KEEP} in {equal}, as good in {sum(same)} of {SEEDS}")
    return {"racing_row_fraction": fraction, "racing_same_decision": sum(same) / SEEDS}


def _sample(losses: dict[str, RowLosses], seed: int) -> dict[str, RowLosses]:
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    return {name: _part(row_losses, order) for name, row_losses in losses.items()}


def _part(losses: RowLosses, rows: torch.Tensor | slice) -> RowLosses:
    return RowLosses(losses.loss[rows], losses.correct[rows], losses.tokens[rows])


def _race(losses: dict[str, RowLosses], runs: dict[str, str]) -> tuple[list[str], int]:
    seen, start, alive = 0, 0, list(losses)
    sizes = round_sizes(SAMPLE, "racing")
    for size in sizes:
        seen += len(alive) * (size - start)
        if size != sizes[-1]:
            alive = survivors({name: _part(losses[name], slice(size)) for name in alive}, runs, KEEP)
        start = size
    return _top({name: losses[name] for name in alive}, runs), seen


def _top(losses: dict[str, RowLosses], runs: dict[str, str]) -> list[str]:
    best: dict[str, str] = {}
    for name in sorted(losses, key=lambda name: losses[name].mean_loss):
        best.setdefault(runs[name], name)
    return list(best.values())[:KEEP]


def _near(model: nn.Module, held_out: SampleRows, *choices: Sequence[str]) -> bool:
    """Whether the merges of two choices differ by at most 1% in held-out loss."""
    first, second = (_merged_loss(model, held_out, choice) for choice in choices)
    return abs(first - second) <= 0.01 * second


def _merged_loss(model: nn.Module, held_out: SampleRows, paths: Sequence[str]) -> float:
    inputs = [load_factors(read_adapter(path)) for path in paths]
    rank = max(factors.rank for factors in inputs[0].values())
    with undisturbed(model):
        merged = merge_factors(inputs, weights=[1 / len(inputs)] * len(inputs), ranks=rank)
        return evaluate(model, held_out, "loss", LoraUpdate(merged.factors)).mean_loss


def growth(plot: Path | None) -> dict[str, float]:
    """Seconds, row-forwards and memory of a race over ever more candidates, and the exponent of the seconds."""
    target = "last"
    model, rows, _ = quickstart(target, SAMPLE)
    points = []
    with tempfile.TemporaryDirectory() as directory:
        paths = [path for path, _ in candidates(Path(directory), target, GROWTH[-1])]
        mixed = [paths[index] for index in torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))]
        score_candidates(model, mixed[:4], rows)
        forget_peak()
        for count in GROWTH:
            started = time.perf_counter()
            scores = score_candidates(model, mixed[:count], rows, search="racing", keep=KEEP)
            points.append(
                (count, time.perf_counter() - started, sum(score.rows for score in scores), resident_bytes("VmHWM"))
            )
            text = "{} candidates: {:.1f} s, {} row-forwards, peak memory {:.0f} MB"
            console.print(text.format(*points[-1][:3], points[-1][3] / 1e6))
    exponent, by_rows = (slope([(count, values[axis]) for count, *values in points]) for axis in (0, 1))
    console.print(f"exponent {exponent:.2f} of the seconds, {by_rows:.2f} of the row-forwards")
    if plot:
        draw(points, exponent, plot)
    return {"growth_exponent": exponent}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Exponent of the power law that fits the points best."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def draw(points: Sequence[tuple], exponent: float, path: Path) -> None:
    counts, times, rows, _ = zip(*points, strict=True)
    title = f"{counts[-1] / counts[0]:.0f} times the candidates take {times[-1] / times[0]:.0f} times as long"
    figure, (upper, lower) = style.new_figure(title, (7, 6), (1, 1))
    upper.loglog(counts, times, "o-", color=style.BLUE)
    upper.set(ylabel=f"seconds (exponent {exponent:.2f})")
    upper.set_yticks(times, [f"{value:.1f}" for value in times])
    lower.loglog(counts, rows, "o-", color=style.BLUE, label="racing")
    lower.loglog(counts, [SAMPLE * n for n in counts], "s:", color=style.ORANGE, label="every row for each")
    lower.legend(frameon=False)
    lower.set(ylabel="forward passes of a row")
    for axes in (upper, lower):
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.set_xlabel("candidates")
    style.save(figure, path)


def memory() -> dict[str, float]:
    """Peak memory of scoring, sparse and dense labels, by that of the same forward without a head."""
    peaks = {mode: _in_process(mode) for mode in ("headless", "sparse", "dense")}
    console.print(", ".join(f"{mode} {peak / 1e6:.0f} MB" for mode, peak in peaks.items()))
    return {"peak_memory_vs_headless": max(peaks["sparse"], peaks["dense"]) / peaks["headless"]}


def _in_process(mode: str) -> float:
    # A process's own high-water mark never falls, so each mode has a process of its own.
    command = [sys.executable, __file__, "--memory-of", mode]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_of(mode: str) -> float:
    """Bytes that one forward needs at its peak, the model included and the interpreter left out."""
    before = resident_bytes("VmRSS")
    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = llama(vocab_size=VOCABULARY, **sizes)
    tokens = torch.randint(2, VOCABULARY, (LONG_ROWS, LONG_LENGTH))
    # Building the model took more than it needs afterwards.
    forget_peak()
    if mode == "headless":
        with torch.no_grad():
            model.model(tokens, use_cache=False)
        return resident_bytes("VmHWM") - before
    labels = tokens.clone()
    if mode == "sparse":
        labels[:, : -LONG_LENGTH // 16] = -100
    with undisturbed(model):
        evaluate(model, SampleRows([{"input_ids": tokens, "labels": labels}], lambda rows: rows[0]))
    return resident_bytes("VmHWM") - before


def forget_peak() -> None:
    """Begins to count this process's peak memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> float:
    """Memory of this process as Linux counts it: `"VmRSS"` now, `"VmHWM"` at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def main() -> None:
    """Parse the command line, measure and report."""
    parts = ("throughput", "racing", "growth", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="write the growth as a picture to this file")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median counts")
    parser.add_argument("--cpu-time", action="store_true", help="compare processor time: on a machine that is busy")
    parser.add_argument("--memory-of", choices=("headless", "sparse", "dense"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(options.memory_of))
        return
    measure = {
        "throughput": lambda: throughput(
            options.repeats, time.process_time if options.cpu_time else time.perf_counter
        ),
        "racing": racing,
        "growth": lambda: growth(options.plot),
        "memory": memory,
    }
    numbers = {name: value for part in options.only for name, value in measure[part]().items()}
    console.print_json(data=numbers)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
