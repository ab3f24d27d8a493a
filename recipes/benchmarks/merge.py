"""
Time the linear merge of three rank-16 adapters against peft's exact `add_weighted_adapter(combination_type="svd")`.

Both give the best rank-16 approximation of the mean update. Run on the CPU:

    python recipes/benchmarks/merge.py --json merge.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from mashup_callback.lora import merge_factors
from mashup_callback.lowrank import LoraFactors


SHAPES = ((1024, 1024), (2048, 2048), (4096, 2048))
ADAPTERS, RANK, ALPHA = 3, 16, 32
WEIGHTS = [1 / ADAPTERS] * ADAPTERS


def peft_model(out_features: int, in_features: int):
    """A single linear layer with `ADAPTERS` random adapters."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(in_features, out_features, bias=False)), config, "0")
    for index in range(1, ADAPTERS):
        model.add_adapter(str(index), config)
    return model


def read_factors(layer, name: str) -> LoraFactors:
    """The factors of one adapter of a peft layer."""
    return LoraFactors(
        layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), float(layer.scaling[name])
    )


def seconds(function, repeats: int) -> tuple[float, object]:
    """Median time of `repeats` calls, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def measure(out_features: int, in_features: int, repeats: int) -> dict[str, float | str]:
    """Time both merges of the same adapters and compare the results."""
    torch.manual_seed(0)
    model = peft_model(out_features, in_features)
    layer = model.base_model.model[0]
    inputs = [{"0": read_factors(layer, str(index))} for index in range(ADAPTERS)]
    merge_factors(inputs, weights=WEIGHTS)  # the first call imports and probes mergekit
    ours, merged = seconds(lambda: merge_factors(inputs, weights=WEIGHTS, ranks=RANK), repeats)
    names = [str(index) for index in range(ADAPTERS)]
    theirs, _ = seconds(
        lambda: model.add_weighted_adapter(names, WEIGHTS, "merged", combination_type="svd", svd_rank=RANK), 1
    )
    expected = read_factors(layer, "merged").delta()
    error = (merged.factors["0"].delta() - expected).norm() / expected.norm()
    return {
        "shape": f"{out_features}x{in_features}",
        "peft_seconds": theirs,
        "mashup_seconds": ours,
        "speedup": theirs / ours,
        "relative_error": error.item(),
        "kept_energy": merged.kept_energy["0"],
    }


def show(rows: list[dict[str, float | str]]) -> None:
    """Print the measurements as a table."""
    table = Table("shape", "peft svd (s)", "mashup (s)", "speed-up", "relative error", "kept energy")
    for row in rows:
        table.add_row(
            str(row["shape"]),
            f"{row['peft_seconds']:.2f}",
            f"{row['mashup_seconds']:.4f}",
            f"{row['speedup']:.0f}x",
            f"{row['relative_error']:.1e}",
            f"{row['kept_energy']:.3f}",
        )
    Console().print(table)


def main() -> None:
    """Parse the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    parser.add_argument("--repeats", type=int, default=9, help="runs of our merge, of which the median counts")
    arguments = parser.parse_args()
    rows = [measure(*shape, arguments.repeats) for shape in SHAPES]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
