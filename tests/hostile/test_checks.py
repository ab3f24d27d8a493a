"""Every check is needed: with it taken away, at least one case of the collection fails."""

import sys

import pytest

from mashup_callback import errors
from mashup_callback.formats import (
    adapter,
    adapter_config,
    adapter_modules,
    checkpoint,
    experts,
    files,
    header,
    variants,
)
from mashup_callback.model import weights
from tests.hostile.cases import CASES
from tests.hostile.judging import Judge
from tests.hostile.removal import Removal, removals


MODULES = [adapter, adapter_config, adapter_modules, checkpoint, experts, files, header, variants, weights]
# What no file of a stranger reaches, by a part of the removal's name.
EXEMPT = {
    "it has not been downloaded yet": "a mistake in the use of these functions",
    "raise CheckpointError(base.refusal)": "the model that is trained, not the checkpoint, is at fault",
    "open_regular: without ValueError": "the user's own path",
    "_read: without OSError": "a shard that vanishes between two system calls",
    "BaseWeights.__call__:": "the model that is trained, which is sharded or offloaded",
    "refuse_huge: without not factors.norm_bound() <= limit": "saves time only",
    "Adapter.refuse_special: without shape.form.whole": "a merge without a model, see tests/lora/test_wholes.py",
}
REMOVALS = [one for module in MODULES for one in removals(module) if not any(part in str(one) for part in EXEMPT)]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("checks"))


@pytest.fixture(scope="module")
def reached(judge):
    """Which cases raise an error in which lines, and all cases, the quickest first."""
    lines, original = [], errors.AdapterError.__init__

    def note(self, *args):
        frame = sys._getframe(1)
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        original(self, *args)

    found, order = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors.AdapterError, "__init__", note)
        for case in CASES:
            lines.clear()
            outcome = judge.outcome(case, judge.copy(case))
            order.append((outcome.seconds, str(case), case))
            found[case] = set(lines)
    return {case: found[case] for *_, case in sorted(order)}


def likely_first(removal: Removal, reached: dict) -> list:
    lines = {(removal.file, line) for line in range(removal.first, removal.last + 1)}
    return sorted(reached, key=lambda case: not reached[case] & lines)


def notices(judge: Judge, case) -> bool:
    directory = judge.copy(case)
    try:
        return judge.failure(case, judge.outcome(case, directory), directory) is not None
    except Exception:
        return True


@pytest.mark.parametrize("removal", REMOVALS, ids=str)
def test_a_case_fails_without(removal, judge, reached):
    with removal.made():
        assert any(notices(judge, case) for case in likely_first(removal, reached))
