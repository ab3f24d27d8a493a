"""The leave-one-out recipe: parity by hand, the tables, every arm on a small version, resuming, data transforms."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from peft import EvaConfig, get_peft_model
from transformers import LlamaForCausalLM

from mashup_callback.lowrank import LoraFactors
from recipes.leave_one_out import arms, cli, outputs, tables
from recipes.leave_one_out import jobs as jobs_module
from recipes.leave_one_out.controls import assert_initialized, randomised
from recipes.leave_one_out.jobs import read_results, result_path, run_job, run_jobs
from recipes.leave_one_out.protocol import Job, Point, make_job, plan, plan_library
from recipes.leave_one_out.worlds import load_world, sources, stdlib
from recipes.leave_one_out.worlds.base import ARMS, Budget
from recipes.leave_one_out.worlds.benchmarks import BENCHMARKS
from recipes.leave_one_out.worlds.quickstart import Quickstart, _tokenizer
from recipes.leave_one_out.worlds.quickstart_full import QuickstartFull
from recipes.quickstart import world as quickstart


TASKS = ("largest", "last")
LIBRARY = ("largest", "smallest", "first", "last")
RESULTS = Path(arms.__file__).parent / "results"


class TwoTasks(Quickstart):
    """The quickstart world with two held-out tasks, four adapters, five steps and few test rows."""

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return LIBRARY

    def evaluate(self, model, target) -> float:
        return quickstart.accuracy(model, _tokenizer(), quickstart.rows(target, 32, 0, "test"))

    def mashup(self, target, candidates=None, **settings):
        return super().mashup(target, candidates, **{"sample_size": 16, **settings})


def budget(**changes) -> Budget:
    sizes = {"tasks": TASKS, "steps": 5, "eval_every": 2, "learning_rate": 3e-3, "seeds": (1,), "oracle_steps": 1}
    return Budget(**{**sizes, **changes})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small version, through every arm; the world, the jobs, the directory and the results."""
    patch = pytest.MonkeyPatch()
    world = TwoTasks(Path("unused"), budget())
    patch.setattr(jobs_module, "load_world", lambda *_: world)
    # Few rows a step keep the test short; nothing else of the world changes.
    patch.setattr(quickstart, "BATCH_SIZE", 4)
    patch.setattr(quickstart, "training_arguments", _fewer_rows(quickstart.training_arguments))
    directory = tmp_path_factory.mktemp("leave-one-out")
    jobs = list(plan(world))
    run_jobs(jobs, directory)
    yield world, jobs, directory, read_results(directory, jobs)
    patch.undo()


def _fewer_rows(function):
    return lambda *args, **settings: function(*args, **{**settings, "per_device_train_batch_size": 4})


def of_arm(results: list[dict], arm: str, task: str = "last") -> dict:
    (found,) = [r for r in results if r["job"]["arm"] == arm and r["job"]["task"] == task]
    return found


# --- parity, by hand


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


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/summary.csv")), ids=lambda path: path.parent.name)
def test_committed_results(path):
    summary = pd.read_csv(path)
    # Results older than the standard errors lack three columns.
    later = ["learning_rate", "gain_se", "worse"]
    older = [name for name in tables.SUMMARY if name not in later]
    used = load_world(path.parent.name, "unused").budget
    assert list(summary.columns) in ([tables.SUMMARY] if used.tuned else [tables.SUMMARY, older])
    # The controls of a tuned world may be still to come.
    arms = tuple(arm for arm in used.arms if arm in set(summary["arm"]) or not used.tuned)
    assert tuple(summary["arm"]) == arms and {"scratch", "mashup"} <= set(arms)
    assert set(summary["tasks"]) == {len(used.tasks)} and set(summary["seeds"]) == {len(used.seeds)}
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


# --- every arm, on two tasks and five steps


def test_every_arm_leaves_a_whole_curve(small):
    _, _, _, results = small
    assert {(r["job"]["task"], r["job"]["arm"]) for r in results} == {(t, a) for t in TASKS for a in ARMS}
    for result in results:
        assert [point["step"] for point in result["curve"]] == [0, 2, 4, 5]
        assert all(0 <= point["value"] <= 1 for point in result["curve"])
        assert (result["overhead"] > 0) == (result["job"]["arm"] != "scratch")


def test_arms_choose_what_their_name_says(small):
    _, _, _, results = small
    assert len(of_arm(results, "all")["chosen"]) == 3
    assert len(of_arm(results, "best_single")["chosen"]) == 1
    assert len(of_arm(results, "paper")["chosen"]) == 2
    assert of_arm(results, "random")["chosen"] == ["random"]
    assert len(of_arm(results, "oracle")["chosen"]) in (1, 3)
    for arm in ("mashup", "all", "paper", "best_single", "oracle"):
        assert "last" not in of_arm(results, arm)["chosen"]
    assert not of_arm(results, "scratch")["chosen"]


def test_the_oracle_takes_the_best_subset_and_is_charged_for_its_search(small, monkeypatch, tmp_path):
    world, _, _, _ = small
    tried = []

    def train(world, job, start, stop_after):
        tried.append(start.mashups[0].subset)
        value = 0.9 if tried[-1] == ("first",) else 0.1 * len(tried[-1])
        return [Point(stop_after, 100.0, value)], None

    def mashup(target, subset, **settings):
        assert settings["top_k"] == len(subset)
        report = SimpleNamespace(seconds=1.0)
        return SimpleNamespace(subset=tuple(Path(name).name for name in subset), report=report)

    monkeypatch.setattr(arms, "train", train)
    monkeypatch.setattr(world, "mashup", mashup)
    start = arms.begin(world, make_job(world, "last", "oracle", 1, 3e-3, {}), tmp_path)
    assert start.chosen == ("first",)
    # The three candidates, then their only triple: 100 s of training and 1 s of merging each, and the last merge.
    assert [len(subset) for subset in tried] == [1, 1, 1, 3]
    assert start.overhead == pytest.approx(4 * 101.0 + 1.0)


def test_tables_of_the_small_version_agree_with_its_curves(small):
    world, _, _, results = small
    made = outputs.make_tables(tables.curves(results), world)
    summary = made["summary"].set_index("arm")
    assert list(summary.index) == list(ARMS)
    for arm in ARMS:
        ends = [of_arm(results, arm, task)["curve"][-1]["value"] for task in TASKS]
        goals = [of_arm(results, "scratch", task)["curve"][-1]["value"] for task in TASKS]
        shares = [_by_hand(of_arm(results, arm, task)["curve"], goal) for task, goal in zip(TASKS, goals, strict=True)]
        assert summary["mean"][arm] == pytest.approx(sum(ends) / 2)
        assert summary["gain"][arm] == pytest.approx((sum(ends) - sum(goals)) / 2)
        assert summary["steps_to_parity"][arm] == pytest.approx(sum(shares) / 2)


def _by_hand(curve: list[dict], goal: float) -> float:
    """Parity by brute force: the first of many small fractions of a step at which the broken line is at the goal."""
    for now, then in pairwise(curve):
        for part in range(10001):
            if now["value"] + (then["value"] - now["value"]) * part / 10000 >= goal - 1e-12:
                return round((now["step"] + (then["step"] - now["step"]) * part / 10000) / 5, 3)
    return 1.0


def test_an_interrupted_run_continues(small, monkeypatch):
    _, jobs, directory, _ = small
    kept, gone = result_path(directory, jobs[1]), result_path(directory, jobs[0])
    before = json.loads(gone.read_text(encoding="utf-8"))
    gone.unlink()
    ran = []
    monkeypatch.setattr(jobs_module, "run_job", lambda job, **settings: ran.append(job) or run_job(job, **settings))
    stamp = kept.stat().st_mtime_ns
    run_jobs(jobs, directory)
    assert ran == [jobs[0]]
    assert kept.stat().st_mtime_ns == stamp
    again = json.loads(gone.read_text(encoding="utf-8"))
    assert [p["value"] for p in again["curve"]] == [p["value"] for p in before["curve"]]


def test_a_failing_job_leaves_no_result(small, monkeypatch):
    world, _, directory, _ = small
    assert world.mashup("last").config.on_error == "raise"
    job = make_job(world, "last", "mashup", 9, 3e-3, {})
    monkeypatch.setattr(world, "mashup", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no disk")))
    with pytest.raises(RuntimeError, match="no disk"):
        run_job(job, directory)
    assert not result_path(directory, job).exists()


def test_every_run_pays_for_its_own_scoring(small, tmp_path, monkeypatch):
    """Arms after the first would find the scores of the first, and their overhead would be too low."""
    world, _, _, _ = small
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "cache"))
    run_job(make_job(world, "last", "mashup", 1, 3e-3, {}), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_plain_initialization_is_noticed(small):
    world, _, _, _ = small
    settings = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    named_only = get_peft_model(world.base_model(), world.lora_config(**settings))
    before = {name: value.clone() for name, value in named_only.named_parameters() if "lora_A" in name}
    with pytest.raises(RuntimeError, match="EVA left .*q_proj.lora_A.default.weight as it was"):
        assert_initialized("EVA", before, named_only)
    with torch.no_grad():
        for name in before:
            named_only.get_parameter(name).add_(1)
    assert_initialized("EVA", before, named_only)


# --- all weights trained


class TwoFullTasks(QuickstartFull):
    """Two held-out tasks, three full checkpoints, five steps and few test rows."""

    evaluate = TwoTasks.evaluate

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return ("largest", "first", "last")

    def mashup(self, target, candidates=None, **settings):
        return super().mashup(target, candidates, **{"sample_size": 16, **settings})


def headings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("#", "!"))]


def test_full_fine_tuning(tmp_path, monkeypatch):
    world = TwoFullTasks(tmp_path / "world", budget(arms=QuickstartFull.all_arms, learning_rate=1e-3))
    monkeypatch.setattr(jobs_module, "load_world", lambda *_: world)
    monkeypatch.setattr(quickstart, "BATCH_SIZE", 4)
    monkeypatch.setattr(quickstart, "training_arguments", _fewer_rows(quickstart.training_arguments))
    library = list(plan_library(world))
    run_jobs(library, tmp_path)
    assert [job.task for job in library] == ["largest", "first", "last"] and list(plan_library(world)) == []
    base = world.base_model()
    trained = LlamaForCausalLM.from_pretrained(world.adapter("first"))
    assert not torch.equal(trained.model.embed_tokens.weight, base.model.embed_tokens.weight)
    run_jobs(list(plan(world)), tmp_path)
    results = read_results(tmp_path, list(plan(world)))
    assert [len(r["curve"]) for r in results] == [4] * 8
    assert sorted(of_arm(results, "all")["chosen"]) == ["first", "largest"]
    assert len(of_arm(results, "best_single")["chosen"]) == 1
    assert of_arm(results, "all")["curve"][0] != of_arm(results, "scratch")["curve"][0]
    outputs.write_outputs(results, world, tmp_path / "out")
    assert set(pd.read_csv(tmp_path / "out/summary.csv")["arm"]) == set(QuickstartFull.all_arms)
    # From the points alone the same again, and from the tables alone all but the curves.
    before = headings(tmp_path / "out/report.md")
    assert "![Learning curves](curves.png)" in before and len(before) > 8
    outputs.write_outputs([], world, tmp_path / "out")
    assert headings(tmp_path / "out/report.md") == before
    (tmp_path / "out/results.csv").unlink()
    outputs.write_outputs([], world, tmp_path / "out")
    assert headings(tmp_path / "out/report.md") == [line for line in before if "Learning curves" not in line]


# --- the plan and the random control


def test_the_plan_has_every_job_once(tmp_path):
    world = TwoTasks(
        tmp_path, budget(learning_rates=(1e-3, 3e-3), sample_sizes=(8,), methods=("ties",), top_ks=(1, 2))
    )
    jobs = list(plan(world))
    assert len(jobs) == len({job.key for job in jobs})
    # Nine arms; one more learning rate for two of them; one sample size; two pairs of method and k.
    assert len(jobs) == 2 * (9 + 2 + 1 + 2)
    # The arms of a task and seed run after one another.
    runs = [(job.task, job.seed, job.arm) for job in plan(TwoTasks(tmp_path, budget(seeds=(1, 2))))]
    assert runs == [(task, seed, arm) for seed in (1, 2) for task in TASKS for arm in ARMS]
    assert list(plan_library(world)) == []


def test_the_studies_may_be_of_fewer_tasks(tmp_path):
    sizes = {"learning_rates": (1e-3, 3e-3), "sample_sizes": (8,), "methods": ("ties",), "top_ks": (1, 2)}
    world = TwoTasks(tmp_path, budget(study_tasks=("last",), **sizes))
    assert len(list(plan(world))) == 2 * (9 + 2) + (1 + 2)
    assert {job.task for job in plan(world) if job.settings} == {"last"}
    options = cli.parsed(cli.parser(None), ["--tasks", "largest"])
    assert {job.task for job in plan(cli.narrowed(world, options))} == {"largest"}
    assert not any(job.settings for job in plan(world))
    options = cli.parsed(cli.parser(None), ["--tasks", "last"])
    assert {job.task for job in plan(cli.narrowed(world, options)) if job.settings} == {"last"}


def test_random_adapter_keeps_norms_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator)
    update = LoraFactors(A, B, 2.0)
    drawn = randomised({"layer": update}, seed=1)["layer"]
    assert torch.linalg.norm(drawn.delta()).item() == pytest.approx(torch.linalg.norm(update.delta()).item(), rel=1e-5)
    assert (drawn.A.norm() / drawn.B.norm()).item() == pytest.approx((A.norm() / B.norm()).item(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(drawn.delta().flatten(), update.delta().flatten(), dim=0)
    assert abs(cosine.item()) < 0.2
    assert not torch.equal(drawn.A, randomised({"layer": update}, seed=2)["layer"].A)


# --- the paper's data, from one row of each data set's schema


PICKED = {"question": "Where?", "choices": {"text": ["bank", "mall"], "label": ["1", "2"]}, "answerKey": "2"}
PROBLEM = {"Problem": "Half of 76 ?", "options": "a ) 38 , b ) 27.675 , c ) rs . 1,200 , d ) none of these"}
SENTENCE = {"sentence": "Ann thanked Bo as _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"}
ROWS = {
    "arc_easy": (PICKED, ("Where?", ["bank", "mall"], "B")),
    "math_qa": (
        {**PROBLEM, "correct": "c"},
        ("Half of 76 ?", ["38", "27.675", "rs . 1,200", "none of these"], "C"),
    ),
    "winogrande": (SENTENCE, ("Ann thanked Bo as _ had helped.", ["Ann", "Bo"], "B")),
}


@pytest.mark.parametrize("name", ROWS)
def test_benchmark_rows_become_questions_answered_with_a_letter(name):
    row, (text, options, letter) = ROWS[name]
    chat = BENCHMARKS[name].read(row).chat()
    assert chat["completion"] == [{"role": "assistant", "content": letter}]
    (message,) = chat["prompt"]
    assert message["role"] == "user"
    assert text in message["content"]
    assert [line for line in message["content"].splitlines() if line[1:3] == ". "] == [
        f"{'ABCDE'[index]}. {option}" for index, option in enumerate(options)
    ]


def test_an_answer_that_is_no_option_is_refused():
    with pytest.raises(ValueError, match="Found answer -1 of 2 options"):
        BENCHMARKS["winogrande"].read({**ROWS["winogrande"][0], "answer": "0"})


# --- the standard library's sources


def test_functions_to_train_on_and_to_test_on_share_no_docstring():
    train, test = (sources.function_pairs("http", split) for split in ("train", "test"))
    assert train and test
    assert not {text for text, _ in train} & {text for text, _ in test}


def test_sources_of_the_base_and_of_the_packages_are_disjoint():
    base = set(sources.source_files())
    for package in sources.PACKAGES:
        train, unseen = (set(sources.split_files(package, split)) for split in ("train", "test"))
        assert train and unseen
        assert not train & unseen
        assert not base & (train | unseen)


@pytest.mark.parametrize("name", ["stdlib", "smollm2-code"])
def test_a_uniform_model_has_the_nll_per_byte_of_its_vocabulary(name, tmp_path):
    """Every token costs log V: the world's number is that, over bytes a token."""
    world = load_world(name, tmp_path, fast=True)
    tokenizer = world.tokenizer = stdlib.train_tokenizer(sources.source_files("http"))
    model = stdlib.small_llama(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    for split in ("test", "validation") if name == "smollm2-code" else ("test",):
        tokens, size = world.unseen_blocks("asyncio", split)
        # A byte-level token has one character for each byte.
        named = [tokenizer.convert_ids_to_tokens(block[1:]) for block in tokens.tolist()]
        assert size == sum(len(text) for block in named for text in block if text != world.end)
        expected = math.log(len(tokenizer)) * tokens[:, 1:].numel() / size
        assert world.nll(model, "asyncio", split) == pytest.approx(expected, rel=1e-5)
    assert world.evaluate(model, "asyncio") == pytest.approx(world.nll(model, "asyncio", "test"))
    assert world.final(model, "asyncio") in ({}, {"validation": pytest.approx(expected, rel=1e-5)})
