"""Hostile adapters and checkpoints: each is rejected with a reason that names what is wrong, or it is harmless."""

import dataclasses
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.hostile.cases import CASES
from tests.hostile.cases.case import Case
from tests.hostile.judging import Judge, Outcome, outcomes_table, size


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, Outcome]:
    """What became of each case that ran so far."""
    return {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(judge, outcomes, case, monkeypatch):
    directory = judge.copy(case)
    monkeypatch.chdir(directory)
    outcome = judge.outcome(case, directory)
    outcomes[case] = outcome
    assert judge.failure(case, outcome, directory) is None
    assert not (directory / "executed").exists()
    assert outcome.seconds < 1 and outcome.megabytes < 100 + size(directory)


def test_the_table_counts_every_case(outcomes):
    if len(outcomes) < len(CASES):
        pytest.skip("a part of the collection ran")
    table = outcomes_table(outcomes.items())
    assert f"| in all | {len(CASES)} |" in table.splitlines()[-1]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.partition("<!-- outcomes -->\n")[2].partition("\n<!-- /outcomes -->")[0] == table


def test_every_field_of_peft_is_changed():
    assert len(CASES) >= 150 and len({str(case) for case in CASES}) == len(CASES)
    assert {item.name for item in dataclasses.fields(LoraConfig)} <= {case.field for case in CASES}
