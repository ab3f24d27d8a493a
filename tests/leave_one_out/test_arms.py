"""Every arm on two tasks and five steps: what it chooses, its curve and its cost; resuming."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import EvaConfig, get_peft_model

from mashup_callback.lowrank import LoraFactors
from recipes.leave_one_out import arms, outputs, tables
from recipes.leave_one_out import jobs as jobs_module
from recipes.leave_one_out.controls import assert_initialized, randomised
from recipes.leave_one_out.jobs import read_results, result_path, run_job, run_jobs
from recipes.leave_one_out.protocol import Point, make_job, plan
from recipes.leave_one_out.worlds.base import ARMS
from tests.leave_one_out.small import TASKS, TwoTasks, budget, of_arm, use


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small version, through every arm; the world, the jobs, the directory and the results."""
    world, directory = TwoTasks(Path("unused"), budget()), tmp_path_factory.mktemp("leave-one-out")
    jobs = list(plan(world))
    with pytest.MonkeyPatch.context() as patch:
        use(patch, world)
        run_jobs(jobs, directory)
        results = read_results(directory, jobs)
        yield SimpleNamespace(world=world, jobs=jobs, directory=directory, results=results)


def test_every_arm_leaves_a_whole_curve(small):
    assert {(r["job"]["task"], r["job"]["arm"]) for r in small.results} == {(t, a) for t in TASKS for a in ARMS}
    for result in small.results:
        assert [point["step"] for point in result["curve"]] == [0, 2, 4, 5]
        assert all(0 <= point["value"] <= 1 for point in result["curve"])
        assert (result["overhead"] > 0) == (result["job"]["arm"] != "scratch")


def test_arms_choose_what_their_name_says(small):
    assert len(of_arm(small.results, "all")["chosen"]) == 3
    assert len(of_arm(small.results, "best_single")["chosen"]) == 1
    assert len(of_arm(small.results, "paper")["chosen"]) == 2
    assert of_arm(small.results, "random")["chosen"] == ["random"]
    assert len(of_arm(small.results, "oracle")["chosen"]) in (1, 3)
    for arm in ("mashup", "all", "paper", "best_single", "oracle"):
        assert "last" not in of_arm(small.results, arm)["chosen"]
    assert not of_arm(small.results, "scratch")["chosen"]


def test_the_oracle_takes_the_best_subset_and_is_charged_for_its_search(small, monkeypatch, tmp_path):
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
    monkeypatch.setattr(small.world, "mashup", mashup)
    start = arms.begin(small.world, make_job(small.world, "last", "oracle", 1, 3e-3, {}), tmp_path)
    assert start.chosen == ("first",)
    # The three candidates, then their only triple: 100 s of training and 1 s of merging each, and the last merge.
    assert [len(subset) for subset in tried] == [1, 1, 1, 3]
    assert start.overhead == pytest.approx(4 * 101.0 + 1.0)


def test_tables_of_the_small_version_agree_with_its_curves(small):
    made = outputs.make_tables(tables.curves(small.results), small.world)
    summary = made["summary"].set_index("arm")
    assert list(summary.index) == list(ARMS)
    for arm in ARMS:
        goals = [of_arm(small.results, "scratch", task)["curve"][-1]["value"] for task in TASKS]
        curves = [of_arm(small.results, arm, task)["curve"] for task in TASKS]
        ends = [curve[-1]["value"] for curve in curves]
        shares = [_by_hand(curve, goal) for curve, goal in zip(curves, goals, strict=True)]
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
    kept, gone = result_path(small.directory, small.jobs[1]), result_path(small.directory, small.jobs[0])
    before = json.loads(gone.read_text(encoding="utf-8"))
    gone.unlink()
    ran = []
    monkeypatch.setattr(jobs_module, "run_job", lambda job, **settings: ran.append(job) or run_job(job, **settings))
    stamp = kept.stat().st_mtime_ns
    run_jobs(small.jobs, small.directory)
    assert ran == [small.jobs[0]]
    assert kept.stat().st_mtime_ns == stamp
    again = json.loads(gone.read_text(encoding="utf-8"))
    assert [p["value"] for p in again["curve"]] == [p["value"] for p in before["curve"]]


def test_a_failing_job_leaves_no_result(small, monkeypatch):
    assert small.world.mashup("last").config.on_error == "raise"
    job = make_job(small.world, "last", "mashup", 9, 3e-3, {})
    monkeypatch.setattr(small.world, "mashup", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no disk")))
    with pytest.raises(RuntimeError, match="no disk"):
        run_job(job, small.directory)
    assert not result_path(small.directory, job).exists()


def test_every_run_pays_for_its_own_scoring(small, tmp_path, monkeypatch):
    """Arms after the first would find the scores of the first, and their overhead would be too low."""
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "cache"))
    run_job(make_job(small.world, "last", "mashup", 1, 3e-3, {}), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_plain_initialization_is_noticed(small):
    settings = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    named_only = get_peft_model(small.world.base_model(), small.world.lora_config(**settings))
    before = {name: value.clone() for name, value in named_only.named_parameters() if "lora_A" in name}
    with pytest.raises(RuntimeError, match="EVA left .*q_proj.lora_A.default.weight as it was"):
        assert_initialized("EVA", before, named_only)
    with torch.no_grad():
        for name in before:
            named_only.get_parameter(name).add_(1)
    assert_initialized("EVA", before, named_only)


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
