"""The jobs of a study."""

from recipes.leave_one_out import cli
from recipes.leave_one_out.protocol import plan, plan_library
from recipes.leave_one_out.worlds.base import ARMS
from tests.leave_one_out.small import TASKS, TwoTasks, budget


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
