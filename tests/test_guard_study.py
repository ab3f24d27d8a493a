"""What the study of a guard that trains makes of its runs, on runs with known answers."""

from pathlib import Path

import pandas as pd
import pytest

from recipes.benchmarks import guard
from recipes.benchmarks.guard import LONGER, choose, cost, table


def start(name, losses, end, task="a"):
    found = {"world": "w", "learning_rate": 0.1, "task": task, "seed": 1, "start": name, "steps": 64, "end": end}
    return found | {"losses": dict(zip(["0", "2", "4", "8", "16"], losses, strict=True)), "evaluation": 2.0}


def three(task="a"):
    """The single candidate is ahead before training, the merge after 8 steps, and the fresh one at the end."""
    fresh = start("fresh", [9.0, 8.0, 3.0, 2.0, 1.0], 0.1, task)
    single = start("single", [1.0, 1.0, 1.0, 1.0, 1.0], 0.5, task)
    merge = start("merge", [2.0, 1.8, 1.5, 0.9, 0.8], 0.2, task)
    return {"fresh": fresh, "single": single, "merge": merge}


@pytest.mark.parametrize(
    ("steps", "extrapolate", "expected"),
    [(0, False, "single"), (4, False, "single"), (4, True, "merge"), (8, False, "merge")],
)
def test_a_start_that_is_ahead_before_training_loses_if_it_falls_behind(steps, extrapolate, expected):
    assert choose(three(), steps, extrapolate) == expected


def test_regret_gain_and_cost():
    row = rows_of([*three("a").values(), *three("b").values()])["held-out loss", 8]
    assert (row["regret"], row["gain"], row["gain_se"]) == (0.1, 0.3, 0.0)
    assert (row["runs"], row["better"], row["worse"], row["best_chosen"]) == (2, 2, 0, 0)
    # Three starts for four steps, two for four more, five evaluations of two steps.
    assert row["cost_steps"] == cost(three(), 8) == 3 * 4 + 2 * 4 + 5 * 2.0
    assert row["share_of_run"] == pytest.approx(30 / 64, abs=5e-4)


def rows_of(done):
    return {(row["rule"], row["guard_steps"]): row for row in table(done).to_dict("records")}


def test_runs_without_a_single_candidate_or_a_merge_are_left_out_and_the_control_is_charged():
    done = [run for task in "ab" for run in three(task).values()]
    longer = start(LONGER, [1.0] * 5, 0.05) | {"steps": 80}
    rows = rows_of([*done, longer, start("fresh", [1.0] * 5, 0.0, "c")])
    assert rows["always fresh", 0]["best_chosen"] == rows["always fresh", 0]["runs"] == 2
    control = rows[LONGER, 0]
    assert (control["runs"], control["regret"], control["cost_steps"]) == (1, -0.05, 16)


def test_the_committed_table_follows_from_the_committed_runs():
    runs, expected = (pd.read_csv(Path(guard.__file__).with_name(f"{name}.csv")) for name in ("guard_runs", "guard"))
    done = [
        {"world": "quickstart", "learning_rate": 0.003, "evaluation": 1.0, **run}
        | {"losses": {step: run[f"loss_{step}"] for step in guard.WATCHED}}
        for run in runs.to_dict("records")
    ]
    # The cost depends on seconds, which were not kept, and the runs are rounded to four digits.
    columns = [name for name in expected if name not in ("cost_steps", "share_of_run")]
    pd.testing.assert_frame_equal(table(done)[columns], expected[columns], atol=1.5e-4, rtol=0)
