"""The quickstart world with two held-out tasks and five steps."""

from functools import partial

from recipes.leave_one_out import jobs as jobs_module
from recipes.leave_one_out.worlds.base import Budget
from recipes.leave_one_out.worlds.quickstart import Quickstart, _tokenizer
from recipes.quickstart import world as quickstart


TASKS = ("largest", "last")


class FewRows:
    """A world that is tested and scored on few rows."""

    def evaluate(self, model, target) -> float:
        return quickstart.accuracy(model, _tokenizer(), quickstart.rows(target, 32, 0, "test"))

    def mashup(self, target, candidates=None, **settings):
        return super().mashup(target, candidates, **{"sample_size": 16, **settings})


class TwoTasks(FewRows, Quickstart):
    """The quickstart world with two held-out tasks and four adapters."""

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return ("largest", "smallest", "first", "last")


def budget(**changes) -> Budget:
    sizes = {"tasks": TASKS, "steps": 5, "eval_every": 2, "learning_rate": 3e-3, "seeds": (1,), "oracle_steps": 1}
    return Budget(**{**sizes, **changes})


def use(patch, world) -> None:
    """Makes it the world of every job; few rows a step keep the test short."""
    patch.setattr(jobs_module, "load_world", lambda *_: world)
    patch.setattr(quickstart, "BATCH_SIZE", 4)
    arguments = partial(quickstart.training_arguments, per_device_train_batch_size=4)
    patch.setattr(quickstart, "training_arguments", arguments)


def of_arm(results: list[dict], arm: str, task: str = "last") -> dict:
    (found,) = [r for r in results if r["job"]["arm"] == arm and r["job"]["task"] == task]
    return found
