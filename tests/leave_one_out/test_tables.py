"""The tables, by hand: parity, summaries, ranks and regret; and the committed ones."""

import math
from pathlib import Path

import pandas as pd
import pytest

from recipes.leave_one_out import arms, outputs, tables
from recipes.leave_one_out.protocol import Job
from recipes.leave_one_out.worlds import load_world
from recipes.leave_one_out.worlds.base import ARMS


RESULTS = Path(arms.__file__).parent / "results"


@pytest.mark.parametrize(
    ("values", "goal", "up", "expected"),
    [
        ([0.2, 0.4, 0.8], 0.4, True, 10.0),
        ([0.2, 0.4, 0.8], 0.6, True, 15.0),
        ([0.5, 0.4, 0.8], 0.5, True, 0.0),
        ([0.2, 0.4, 0.8], 0.9, True, math.inf),
        ([0.2, 0.6, 0.1], 0.5, True, 7.5),
        ([3.0, 2.0, 1.0], 1.5, False, 15.0),
        ([3.0, 2.0, 1.0], 0.9, False, math.inf),
        ([3.0, 2.0, 1.0], 3.5, False, 0.0),
    ],
)
def test_first_reach(values, goal, up, expected):
    assert tables.first_reach([0, 10, 20], values, goal, up) == pytest.approx(expected)


def made_up(arm, values, task="a", seed=1, overhead=0.0, settings=(), learning_rate=0.1, chosen=()) -> dict:
    """A result with points at steps 0, 10 and 20, one second for each step."""
    job = Job("hand", task, arm, seed, learning_rate, 20, 10, 0, settings)
    curve = [{"step": 10 * i, "seconds": 10.0 * i, "value": value} for i, value in enumerate(values)]
    return {"job": job.__dict__, "curve": curve, "overhead": overhead, "decision": "", "chosen": list(chosen)}


HAND = [
    made_up("scratch", [0.0, 0.4, 0.6], "a", 1),
    made_up("scratch", [0.0, 0.2, 0.8], "b", 1),
    made_up("scratch", [0.0, 0.6, 0.6], "a", 2),
    made_up("scratch", [0.0, 0.5, 1.0], "b", 2),
    # Parity at step 5 of 20; with 5 s of overhead at second 10 of 20.
    made_up("mashup", [0.4, 0.8, 0.8], "a", 1, overhead=5.0),
    # Never.
    made_up("mashup", [0.0, 0.3, 0.6], "b", 1, overhead=5.0),
    # At once; the overhead counts.
    made_up("mashup", [0.6, 0.7, 0.9], "a", 2, overhead=5.0),
    # Exactly at the end; with the overhead after scratch's own end.
    made_up("mashup", [0.0, 0.5, 1.0], "b", 2, overhead=5.0),
]


def test_parity_and_summary_by_hand():
    runs = tables.runs(tables.curves(HAND))
    mashup = runs[runs["arm"] == "mashup"]
    assert mashup["steps_to_parity"].tolist() == pytest.approx([0.25, math.inf, 0.0, 1.0])
    assert mashup["seconds_to_parity"].tolist() == pytest.approx([0.5, math.inf, 0.25, 1.25])
    assert mashup["gain"].tolist() == pytest.approx([0.2, -0.2, 0.3, 0.0])
    # Scratch ends at second 20, when these have trained for 15 s, that is, 15 steps.
    assert mashup["equal_seconds"].tolist() == pytest.approx([0.8, 0.45, 0.8, 0.75])
    made = tables.summary(runs, ARMS)
    assert list(made.columns) == tables.SUMMARY and list(made["arm"]) == ["scratch", "mashup"]
    # Means over tasks: scratch 0.7 and 0.8, mashup 0.7 and 0.95.
    assert made["mean"].tolist() == pytest.approx([0.75, 0.825])
    assert made["std"].tolist() == pytest.approx([0.05 * math.sqrt(2), 0.125 * math.sqrt(2)])
    row = made.iloc[1]
    assert row["gain"] == pytest.approx(0.075)
    # The paired differences are 0.2, -0.2, 0.3 and 0.0: squared deviations from their mean add up to 0.1475.
    assert row["gain_se"] == pytest.approx(math.sqrt(0.1475 / 3 / 4))
    assert (row["worse"], row["learning_rate"]) == (1, 0.1)
    # What never reached parity counts as 1.
    assert row["steps_to_parity"] == pytest.approx((0.25 + 1 + 0 + 1) / 4)
    assert row["seconds_to_parity"] == pytest.approx((0.5 + 1 + 0.25 + 1.25) / 4)
    assert (row["tasks"], row["seeds"]) == (2, 2)
    reached = tables.by_task(runs, ARMS).set_index(["task", "arm"])["reached"]
    assert (reached["a", "mashup"], reached["b", "mashup"]) == (1.0, 0.5)
    shown = outputs.shown("summary", {"summary": made, "by_task": tables.by_task(runs, ARMS)})
    # Three of the four runs reach it.
    assert shown["steps_to_parity"].tolist() == [f"{made['steps_to_parity'][0]:.0%}", "56%+"]


def test_parity_of_a_metric_where_lower_is_better():
    results = [made_up("scratch", [3.0, 2.0, 1.0]), made_up("mashup", [2.0, 0.5, 0.5])]
    row = tables.runs(tables.curves(results), higher_is_better=False).iloc[1]
    assert row["gain"] == pytest.approx(0.5)
    # From 2.0 to 0.5 in ten steps: 1.0 after two thirds of them.
    assert row["steps_to_parity"] == pytest.approx(20 / 3 / 20)


@pytest.mark.parametrize(
    ("overhead", "expected"), [(0.0, 0.7), (5.0, 0.6), (15.0, 0.3), (20.0, 0.1), (20.5, math.nan), (-9.0, 0.9)]
)
def test_the_value_at_which_scratch_ends(overhead, expected):
    results = [made_up("scratch", [0.0, 0.0, 0.5]), made_up("mashup", [0.1, 0.5, 0.7], overhead=overhead)]
    results[1]["curve"].append({"step": 30, "seconds": 25.0, "value": 0.9})
    found = tables.runs(tables.curves(results))["equal_seconds"].iloc[1]
    assert found == pytest.approx(expected, nan_ok=True)


def test_the_sweep_is_left_out_of_the_main_table():
    results = [made_up("scratch", [0, 0, 0.5]), made_up("scratch", [0, 0, 0.9], learning_rate=0.2)]
    runs = tables.runs(tables.curves(results))
    assert tables.summary(tables.main_runs(runs, 0.1), ARMS)["mean"].tolist() == [0.5]
    assert tables.learning_rates(runs, [1])["final"].tolist() == [0.5, 0.9]


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("**/summary.csv")), ids=lambda path: str(path.parent.relative_to(RESULTS))
)
def test_committed_results(path):
    summary = pd.read_csv(path)
    # Results older than the standard errors lack three columns.
    later = ["learning_rate", "gain_se", "worse"]
    older = [name for name in tables.SUMMARY if name not in later]
    used = load_world(path.relative_to(RESULTS).parts[0], "unused").budget
    assert list(summary.columns) in ([tables.SUMMARY] if used.tuned else [tables.SUMMARY, older])
    # All controls and seeds are in the first results of a world that is not tuned, and may be missing in others.
    whole = path.parent.name in ("earlier-defaults", "minilm")
    arms = tuple(arm for arm in used.arms if arm in set(summary["arm"]) or whole)
    assert tuple(summary["arm"]) == arms and {"scratch", "mashup"} <= set(arms)
    assert set(summary["tasks"]) == {len(used.tasks)}
    assert set(summary["seeds"]) == {len(used.seeds) if whole else 2}
    # The means over tasks are those of the table by task.
    by_task = pd.read_csv(path.with_name("by_task.csv")).groupby("arm")["gain"].mean()
    assert summary["gain"].tolist() == pytest.approx(by_task[summary["arm"]].tolist(), abs=1e-4)


def test_method_ranks_by_hand():
    grid = {("linear", 1): (0.5, 0.9), ("linear", 3): (0.7, 0.8), ("ties", 3): (0.6, 0.7)}
    results = [
        made_up("mashup", [0, 0, value], task, settings=(("guard", False), ("merge_method", m), ("top_k", k)))
        for (m, k), pair in grid.items()
        for task, value in zip("ab", pair, strict=True)
    ]
    ranks = tables.method_ranks(tables.runs(tables.curves(results))).set_index(["method", "k"])["mean_rank"]
    assert ranks.to_dict() == {("linear", 1): 2.0, ("linear", 3): 1.5, ("ties", 3): 2.5}


def test_regret_and_selection_rows_by_hand():
    results = [
        made_up("mashup", [0, 0, 0.7], chosen=["x", "y"]),
        made_up("oracle", [0, 0, 0.9], chosen=["z"]),
        made_up("mashup", [0, 0, 0.6], settings=(("sample_size", 16),)),
    ]
    runs = tables.runs(tables.curves(results))
    (row,) = tables.regret(tables.main_runs(runs, 0.1)).to_dict("records")
    assert row["regret"] == pytest.approx(0.2)
    assert (row["mashup_chosen"], row["oracle_chosen"]) == ("x;y", "z")
    (rows,) = tables.selection_rows(runs).to_dict("records")
    assert (rows["rows"], rows["final"]) == (8, 0.6)
