"""Every check is needed: with it taken away, at least one case of the collection fails."""

import sys

import pytest

from mashup_callback import errors
from mashup_callback.formats import (
    adapter,
    adapter_config,
    adapter_modules,
    checkpoint,
    files,
    header,
)
from mashup_callback.model import weights
from tests.hostile.cases import CASES
from tests.hostile.judging import Judge
from tests.hostile.removal import Removal, removals


MODULES = [adapter, adapter_config, adapter_modules, checkpoint, files, header, weights]
# What no file of a stranger reaches, by a part of the removal's name.
EXEMPT = {
    "it has not been downloaded yet": "a mistake in the use of these functions",
    "raise CheckpointError(base.refusal)": "the model that is trained, not the checkpoint, is at fault",
    "open_regular: without ValueError": "the user's own path",
    "_read: without OSError": "a shard that vanishes between two system calls",
    "refuse_huge: without not factors.norm_bound() <= limit": "saves time only",
}
# For adapters of other kinds than the plain LoRA that the collection changes: of embeddings or experts, LoHa, DoRA.
OTHER_KINDS = [
    "Adapter.refuse_special:",
    "raise AdapterError(f'unexpected tensor {quote(unknown[0])}",
    "load_factors: without raise AdapterError(f'{WEIGHTS_NAME} changed",
    "_load_parts: without raise AdapterError('`target_parameters`",
    "_load_parts: without not shape.stack.expert",
    "_strings:",
    "was trained besides the adapter",
    "name not in base.wholes",
    "raise AdapterError(f'`modules_to_save` has {count:,} entries",
    "not any((shape.form.whole",
    "all its ranks are zero",
    "not any((shape.stack",
    "raise AdapterError(f'{quote(key)} and {quote(keys[name][part])}",
    "_module_shape: without RuntimeError",
    "_module_shape: without IndexError",
    "found < rank",
    "BaseWeights.__call__:",
]
LEFT_OUT = [*EXEMPT, *OTHER_KINDS]
REMOVALS = [one for module in MODULES for one in removals(module) if not any(part in str(one) for part in LEFT_OUT)]


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
