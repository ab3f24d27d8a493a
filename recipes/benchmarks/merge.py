"""
Time merges of three rank-16 adapters, and their memory, against peft's `add_weighted_adapter`, which merges the same.

Linear merges against `svd`, ties against `ties_svd` and dare_ties against `dare_ties_svd`; every row is one layer.
What dare drops is drawn at random, so its two merges differ. Seconds are those of the processor, which other processes
do not change. Run on the CPU:

    OMP_NUM_THREADS=1 python recipes/benchmarks/merge.py --json merge.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model

from mashup_callback.lora import merge_factors
from mashup_callback.lowrank import LoraFactors
from recipes.benchmarks.memory import Peak


SHAPES = ("1024x1024", "2048x2048", "4096x2048")
METHODS = {"linear": "svd", "ties": "ties_svd", "dare_ties": "dare_ties_svd"}
ADAPTERS, RANK, ALPHA, DENSITY = 3, 16, 32, 0.5
WEIGHTS = [1 / ADAPTERS] * ADAPTERS
# mergekit divides by the sum of the weights, peft by their number: with weights of 1 these are the same.
PEFT_WEIGHTS = {"linear": WEIGHTS, "ties": [1.0] * ADAPTERS, "dare_ties": [1.0] * ADAPTERS}
NAMES = [str(index) for index in range(ADAPTERS)]


def peft_model(out_features: int, in_features: int):
    """A single linear layer with `ADAPTERS` random adapters."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False)), config, "0")
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def read_factors(layer, name: str) -> LoraFactors:
    """The factors of one adapter of a peft layer."""
    return LoraFactors(
        layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.scaling[name])
    )


def measured(function: Callable[[], object], repeats: int = 1) -> tuple[float, float, object]:
    """Median processor seconds of some calls, the megabytes that they added at the most, and the last result."""
    # Memory in a call of its own, as the thread that samples it takes processor time too.
    with Peak() as peak:
        result = function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times), peak.added("all") / 1e6, result


def measure(shape: str, method: str, repeats: int) -> dict[str, float | str]:
    """Time both merges of the same adapters and compare the results."""
    torch.manual_seed(0)
    model = peft_model(*map(int, shape.split("x")))
    layer = model.base_model.model[0]
    inputs = [{"0": read_factors(layer, name)} for name in NAMES]
    parameters = {} if method == "linear" else {"density": DENSITY}
    normalized = {} if method == "linear" else {"normalize": True}
    options = {"method": method, "weights": WEIGHTS, "parameters": parameters | normalized, "ranks": RANK}
    merge_factors(inputs, **options)  # the first call imports and probes mergekit
    ours, our_memory, merged = measured(lambda: merge_factors(inputs, **options), repeats)
    given = {"combination_type": METHODS[method], "svd_rank": RANK, **parameters}

    def merge_by_peft() -> None:
        # peft returns at once where the name is taken.
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(NAMES, PEFT_WEIGHTS[method], "merged", **given)

    theirs, their_memory, _ = measured(merge_by_peft)
    found, expected = merged.factors["0"].delta(), read_factors(layer, "merged").delta()
    return {
        "shape": shape,
        "method": method,
        "peft_seconds": theirs,
        "mashup_seconds": ours,
        "speedup": theirs / ours,
        "peft_megabytes": their_memory,
        "mashup_megabytes": our_memory,
        "relative_difference": ((found - expected).norm() / expected.norm()).item(),
        "norm_ratio": (found.norm() / expected.norm()).item(),
        "kept_energy": merged.kept_energy["0"],
    }


def main() -> None:
    """Parse the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--repeats", type=int, default=5, help="runs of our merge, of which the median counts")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs of the layers")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="which merges")
    arguments = parser.parse_args()
    rows = [measure(shape, method, arguments.repeats) for shape in arguments.shapes for method in arguments.methods]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
