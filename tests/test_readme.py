"""What the README says of tests, settings and files is there."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from mashup_callback import MashupConfig


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = re.findall(r"`(tests/\S+\.py)::(\w+)`", README)


@pytest.mark.parametrize(("file", "name"), TESTS, ids=[name for _, name in TESTS])
def test_named_tests_exist(file, name):
    assert name in {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}


def test_every_launch_mode_is_in_the_table():
    source = ast.parse((ROOT / "tests/distributed/test_modes.py").read_text())
    modes = {node.name for node in source.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    # Tests of the tests, and of what must raise, are no modes.
    assert {name for name in modes if not re.search("seen_by|raise", name)} <= {name for _, name in TESTS}


def test_named_settings_and_files_exist():
    settings = re.search(r"## Settings\n(.*?)\n## ", README, re.DOTALL).group(1)
    names = re.findall(
        r"`(\w+)`", " ".join(row.split("|")[1] for row in settings.splitlines() if row.startswith("| `"))
    )
    assert names and set(names) <= {field.name for field in fields(MashupConfig)}
    for path in re.findall(r"(?:recipes|tests)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path


def test_commands_are_those_of_ci():
    run = (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^    python -m pip install .* && (.*)$", README, re.MULTILINE)
    assert commands == ["python recipes/quickstart/run.py", "python -m pytest"]
    assert all(command in run for command in commands)
