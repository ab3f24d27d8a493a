"""Full fine-tuning on several processes: what training starts from is what the merge on disk holds."""

import pytest

from tests.distributed.launching import case
from tests.distributed.modes import has_deepspeed


FULL = {"trains": "full", "trainer": {"learning_rate": 1e-4}}
ALWAYS, SLOW = ("ddp", "native", "fsdp2"), ("fsdp1", "zero3")


def merged(mode, library, method):
    callback = {"on_error": "raise", "guard": False, "merge_method": method, "top_k": 2}
    return case(mode, library=library, callback=callback, **FULL)


def looked_and_plain(mode, library):
    callback = {"on_error": "raise", "guard": False, "dry_run": True}
    return case(mode, library=library, callback=callback, **FULL), case(mode, library=library, **FULL)


def marks(mode):
    without = pytest.mark.skipif(mode == "zero3" and not has_deepspeed, reason="deepspeed is not installed")
    return [without, *([] if mode in ALWAYS else [pytest.mark.slow])]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(merged(mode, library, method), marks=marks(mode), id=f"{library}-{method}-{mode}")
        for library in ("untied", "tied")
        for method in ("linear", "task_arithmetic")
        for mode in ALWAYS + SLOW
    ],
    indirect=True,
)
def test_first_loss_is_that_of_the_merge_on_disk(run, train_here):
    assert {rank["report"]["decision"] for rank in run.ranks} == {"merged"}
    alone = train_here(base=str(run.directory / "out/mashup"), **FULL)
    # The Trainer logs the same rows' mean; two processes each see half of them.
    assert run.losses == pytest.approx(alone.losses, abs=1e-5)
    assert run.losses[0] == pytest.approx(alone.losses[0], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "other"),
    [
        pytest.param(*looked_and_plain(mode, library), marks=marks(mode), id=f"{library}-{mode}")
        for library in ("untied", "tied")
        for mode in ("fsdp1", "fsdp2", "zero3")
    ],
    indirect=True,
)
def test_scoring_leaves_the_sharded_weights_as_they_were(run, other):
    assert run.ranks[0]["report"]["decision"] == "merged"
    assert [rank["losses"] for rank in run.ranks] == [rank["losses"] for rank in other.ranks]
