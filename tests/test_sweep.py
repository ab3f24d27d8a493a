"""Every arm at its own best learning rate: the choice on validation rows, the jobs that it needs, the tables."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.leave_one_out import outputs, sweep, tables
from recipes.leave_one_out.protocol import Job, plan
from recipes.leave_one_out.worlds import load_world, smollm2_code
from recipes.leave_one_out.worlds.base import Budget


SWEEP = (0.1, 0.2, 0.4)


def budget(**changes) -> Budget:
    sizes = {"tasks": ("a", "b"), "steps": 20, "eval_every": 10, "learning_rate": 0.2, "seeds": (1, 2)}
    return Budget(**{**sizes, "arms": ("scratch", "mashup"), "learning_rates": SWEEP, **changes})


def world_of(used: Budget):
    """What the plan asks of a world whose metric is a loss."""
    return SimpleNamespace(
        name="hand", budget=used, higher_is_better=False, metric="loss", steps=lambda task: used.steps
    )


TUNED = world_of(budget(tuned=("scratch", "mashup")))


def run_of(job: Job, validation: float, final: float = 1.0) -> dict:
    curve = [{"step": step, "seconds": float(step), "value": final + (20 - step)} for step in (0, 10, 20)]
    kept = {"job": job.__dict__, "curve": curve, "final": {"validation": validation}}
    return kept | {"overhead": 0.0, "decision": "", "chosen": []}


def results_of(values: dict[tuple[str, float], float], world=TUNED) -> list[dict]:
    """Results of the whole sweep, from the validation value of each arm and rate, the same on each task."""
    jobs = [Job("hand", task, arm, 1, rate, 20, 10) for task in "ab" for arm, rate in values]
    return [run_of(job, values[job.arm, job.learning_rate]) for job in jobs]


def planned(results: list[dict], world=TUNED) -> set[tuple]:
    return {(job.arm, job.learning_rate, job.seed) for job in sweep.plan_tuned(world, results)}


INSIDE = {("scratch", rate): abs(rate - 0.2) for rate in SWEEP} | {("mashup", rate): rate for rate in SWEEP}


def test_the_sweep_comes_first_and_on_its_own_seeds():
    jobs = list(plan(TUNED))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 3
    assert {job.seed for job in jobs} == {1} and {job.learning_rate for job in jobs} == set(SWEEP)
    assert {job.seed for job in plan(world_of(budget()))} == {1, 2}


def test_a_rate_is_chosen_by_the_mean_over_tasks_of_the_validation_value():
    results = results_of(INSIDE)
    # One task would choose otherwise, by less than the other one gains; the test values say nothing.
    results[0]["final"]["validation"], results[0]["curve"][-1]["value"] = 0.0, -9.0
    assert (results[0]["job"]["arm"], results[0]["job"]["learning_rate"]) == ("scratch", 0.1)
    results[1]["final"]["validation"] = 0.05
    runs = tables.runs(tables.curves(results), False)
    assert sweep.averages(runs, TUNED.budget)["scratch"] == pytest.approx({0.1: 0.05, 0.2: 0.025, 0.4: 0.2})
    assert sweep.chosen(runs, TUNED.budget, False) == {"scratch": 0.2, "mashup": 0.1}
    assert sweep.chosen(runs, TUNED.budget, True) == {"scratch": 0.4, "mashup": 0.4}


def test_a_rate_whose_sweep_is_not_done_is_not_chosen():
    results = [r for r in results_of(INSIDE) if (r["job"]["task"], r["job"]["learning_rate"]) != ("b", 0.2)]
    runs = tables.runs(tables.curves(results), False)
    assert sweep.chosen(runs, TUNED.budget, False) == {"scratch": 0.1, "mashup": 0.1}
    assert sweep.chosen(runs[:0], TUNED.budget, False) == {"scratch": 0.2, "mashup": 0.2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({0.1: 3.0, 0.2: 1.0, 0.4: 2.0}, None),
        ({0.1: 1.0, 0.2: 2.0, 0.4: 3.0}, 0.05),
        ({0.1: 3.0, 0.2: 2.0, 0.4: 1.0}, 0.8),
        ({2.0**n: -n for n in range(6)}, None),
        ({}, None),
    ],
)
def test_the_sweep_grows_until_the_best_rate_is_inside(values, expected):
    assert sweep.beyond(values, higher_is_better=False) == expected


def test_scratch_and_mashup_get_the_same_sweep():
    """Mashup's best is at the lower edge: both are tried there, on the seeds of the sweep."""
    assert planned(results_of(INSIDE)) == {("scratch", 0.05, 1), ("mashup", 0.05, 1)}


def test_each_arm_runs_on_every_seed_at_its_own_rate():
    wider = INSIDE | {("scratch", 0.05): 0.3, ("mashup", 0.05): 0.5}
    expected = {(arm, rate, seed) for arm, rate in (("scratch", 0.2), ("mashup", 0.1)) for seed in (1, 2)}
    assert planned(results_of(wider)) == expected
    assert planned([]) == set()


def test_paired_differences_are_between_arms_each_at_its_own_rate():
    def result(arm, task, seed, rate, validation, final):
        return run_of(Job("hand", task, arm, seed, rate, 20, 10), validation, final)

    results = []
    for task, seed, (scratch, mashup) in (("a", 1, (5, 3)), ("b", 1, (6, 7)), ("a", 2, (5, 4)), ("b", 2, (6, 4))):
        results += [result("scratch", task, seed, 0.2, 0.0, scratch), result("mashup", task, seed, 0.1, 0.0, mashup)]
    for task in "ab":
        results += [result("scratch", task, 1, 0.1, 1.0, 9.0), result("mashup", task, 1, 0.2, 1.0, 2.0)]
    made = outputs.make_tables(tables.curves(results), TUNED)
    scratch, mashup = made["summary"].to_dict("records")
    assert (scratch["learning_rate"], mashup["learning_rate"]) == (0.2, 0.1)
    # 2, -1, 1 and 2: the squared deviations from their mean of 1 add up to 6.
    assert mashup["gain"] == pytest.approx(1.0)
    assert mashup["gain_se"] == pytest.approx(math.sqrt(6 / 3 / 4))
    assert (mashup["worse"], mashup["seeds"]) == (1, 2)
    shared = made["shared_rate"].set_index("arm")
    assert shared["gain"]["mashup"] == pytest.approx((3 + 4) / 2)
    assert set(shared["learning_rate"]) == {0.2} and set(shared["seeds"]) == {1}
    assert "each arm has the learning rate that is best for it" in outputs.notes(TUNED)


@pytest.mark.parametrize("package", ["asyncio", "email", "mpmath", "networkx"])
def test_splits_of_a_package_share_no_file(package):
    splits = [set(smollm2_code.split_files(package, split)) for split in ("train", "validation", "test")]
    assert all(splits) and len(set.union(*splits)) == sum(map(len, splits))
    root = Path(smollm2_code.source_files(package)[0])
    assert smollm2_code.PACKAGES[package].split("/")[0] in root.parts
    assert smollm2_code.split_files(package, "test") == smollm2_code.split_files(package, "test")


def test_the_real_model_is_a_choice(tmp_path):
    world = load_world("smollm2-code", tmp_path)
    assert [Path(name).name for name in world.candidates("sympy")] == [p for p in world.packages if p != "sympy"]
    assert world.lora_config().r == 8 and world.lora_config().lora_alpha == 16
    with pytest.raises(ValueError, match="model is 'moon', expected one of smollm2-135m"):
        load_world("smollm2-code", tmp_path, model="moon")
