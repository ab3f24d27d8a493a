"""All weights trained: the library, every arm, and the report from what is left of the results."""

from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaForCausalLM

from recipes.leave_one_out import outputs
from recipes.leave_one_out.jobs import read_results, run_jobs
from recipes.leave_one_out.protocol import plan, plan_library
from recipes.leave_one_out.worlds.base import Budget
from recipes.leave_one_out.worlds.quickstart_full import QuickstartFull
from tests.leave_one_out.small import FewRows, budget, of_arm, use


class TwoFullTasks(FewRows, QuickstartFull):
    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return ("largest", "first", "last")


def headings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("#", "!"))]


def test_full_fine_tuning(tmp_path, monkeypatch):
    world = TwoFullTasks(tmp_path / "world", budget(arms=QuickstartFull.all_arms, learning_rate=1e-3))
    use(monkeypatch, world)
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
