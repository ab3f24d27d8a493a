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
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from mashup_callback import score_candidates
from mashup_callback.candidates import Candidate, as_candidate
from mashup_callback.lora import LoraUpdate, merge_factors
from mashup_callback.model import undisturbed
from mashup_callback.scoring import SampleRows, Score, evaluate
from mashup_callback.sharing import style
from recipes.benchmarks.memory import Peak, resident
from recipes.benchmarks.samples import quickstart_rows
from recipes.benchmarks.throughput import llama, throughput
from recipes.quickstart import world


CHECKPOINTS, NOISED, KEEP, SEEDS, POOL, SAMPLE = (0.2, 0.4, 0.6, 0.8), 14, 3, 20, 256, 128
GROWTH = (8, 32, 128, 512)
VOCABULARY, LONG_ROWS, LONG_LENGTH = 262_144, 16, 512
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"

console = Console()


def quickstart(target: str, size: int) -> tuple[nn.Module, SampleRows, SampleRows]:
    """The quickstart's base model, and a sample and held-out rows of one of its tasks as its Trainer sees them."""
    sample = quickstart_rows(target, 2 * size)
    return world.load_model().eval(), sample.selection, sample.held_out


def candidates(directory: Path, target: str, count: int) -> list[Candidate]:
    """
    Adapters with their training runs: the trained ones of the other tasks, scaled copies that stand for their earlier
    checkpoints, copies with noise, and random ones of a trained one's norms.
    """
    generator = torch.Generator().manual_seed(0)
    trained = sorted(path for path in world.ADAPTERS.iterdir() if path.name != target)
    found = [_candidate(path, path.name) for path in trained]

    def noised(kept: float, noise: float, name: str, tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        return kept * tensor + noise * drawn

    for share, path in product(CHECKPOINTS, trained):
        copy = _copied(path, directory / f"{path.name}-{share}", partial(_scaled, share))
        found.append(_candidate(copy, path.name))
    while len(found) < count:
        place = len(found)
        is_copy = place % 64 < len(trained) * (1 + len(CHECKPOINTS)) + NOISED
        change = partial(noised, *((1, 0.3) if is_copy else (0, 1)))
        found.append(_candidate(_copied(trained[place % len(trained)], directory / str(place), change), str(place)))
    return found[:count]


def _candidate(path: Path, run: str) -> Candidate:
    return replace(as_candidate(path), run=run)


def _scaled(share: float, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return share * tensor if "lora_B" in name else tensor


def _copied(source: Path, directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    shutil.copy(source / CONFIG_NAME, directory)
    tensors = load_file(source / WEIGHTS_NAME)
    changed = {name: change(name, tensor).to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
    save_file(changed, directory / WEIGHTS_NAME)
    return directory


def racing() -> dict[str, float]:
    """Races on 20 samples against an exhaustive search, whose losses are those of all candidates on all rows."""
    target, equal, same, seen = "last", 0, 0, 0
    model, pool, held_out = quickstart(target, POOL)
    with tempfile.TemporaryDirectory() as directory:
        found = candidates(Path(directory), target, 64)
        known = score_candidates(model, found, pool)
        for seed in range(SEEDS):
            drawn = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:SAMPLE].tolist()
            rows = SampleRows([pool.rows[index] for index in drawn], pool.collate, pool.batch_size, pool.tokens)
            raced = score_candidates(model, found, rows, search="racing", keep=KEEP)
            seen += sum(score.rows for score in raced)
            choices = _top(raced), _top(sorted(known, key=lambda score: score.losses.loss[drawn].sum()))
            names = [{score.candidate.name for score in choice} for choice in choices]
            losses = [_merged_loss(model, held_out, choice) for choice in choices]
            equal += names[0] == names[1]
            same += abs(losses[0] - losses[1]) <= 0.01 * losses[1]
    fraction = seen / (SEEDS * 64 * SAMPLE)
    console.print(f"racing: {fraction:.1%} of the rows; the same {KEEP} in {equal}, as good in {same} of {SEEDS}")
    return {"racing_row_fraction": fraction, "racing_same_decision": same / SEEDS}


def _top(scores: Sequence[Score]) -> list[Score]:
    """The best scores of different runs; the scores are sorted."""
    best: dict[str, Score] = {}
    for score in scores:
        best.setdefault(score.candidate.run, score)
    return list(best.values())[:KEEP]


def _merged_loss(model: nn.Module, held_out: SampleRows, scores: Sequence[Score]) -> float:
    inputs = [score.source.load().factors for score in scores]
    with undisturbed(model):
        merged = merge_factors(inputs, weights=[1 / len(inputs)] * len(inputs), ranks=world.RANK)
        return evaluate(model, held_out, "loss", LoraUpdate(merged.factors)).mean_loss


def growth(plot: Path | None) -> dict[str, float]:
    """Seconds, row-forwards and memory of a race over ever more candidates, and the exponent of the seconds."""
    target, points = "last", []
    model, rows, _ = quickstart(target, SAMPLE)
    with tempfile.TemporaryDirectory() as directory:
        found = candidates(Path(directory), target, GROWTH[-1])
        mixed = [found[index] for index in torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
        score_candidates(model, mixed[:4], rows)
        for count in GROWTH:
            started = time.perf_counter()
            with Peak() as peak:
                scores = score_candidates(model, mixed[:count], rows, search="racing", keep=KEEP)
            points.append((count, time.perf_counter() - started, sum(score.rows for score in scores)))
            text = "{} candidates: {:.1f} s, {} row-forwards, peak memory {:.0f} MB"
            console.print(text.format(*points[-1], peak.most["all"] / 1e6))
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
    counts, times, rows = zip(*points, strict=True)
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
    headless, sparse, dense = map(_in_process, ("headless", "sparse", "dense"))
    console.print(f"headless {headless / 1e6:.0f} MB, sparse {sparse / 1e6:.0f} MB, dense {dense / 1e6:.0f} MB")
    return {"peak_memory_vs_headless": max(sparse, dense) / headless}


def _in_process(mode: str) -> int:
    # What one mode frees would be there for the next one, so each has a process of its own.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(memory_of, mode).result()


def memory_of(mode: str) -> int:
    """Bytes that one forward needs at its peak, the model included and the interpreter left out."""
    before = resident()["all"]
    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = llama(vocab_size=VOCABULARY, **sizes)
    tokens = torch.randint(2, VOCABULARY, (LONG_ROWS, LONG_LENGTH))
    labels = tokens.clone()
    if mode == "sparse":
        labels[:, : -LONG_LENGTH // 16] = -100
    # Building the model took more than it needs afterwards.
    with Peak() as peak, undisturbed(model):
        if mode == "headless":
            with torch.no_grad():
                model.model(tokens, use_cache=False)
        else:
            evaluate(model, SampleRows([{"input_ids": tokens, "labels": labels}], lambda rows: rows[0]))
    return peak.most["all"] - before


def main() -> None:
    """Parse the command line, measure and report."""
    parts = ("throughput", "racing", "growth", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="write the growth as a picture to this file")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median counts")
    parser.add_argument("--cpu-time", action="store_true", help="compare processor time: on a machine that is busy")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    measure = {
        "throughput": lambda: throughput(options.repeats, clock),
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
