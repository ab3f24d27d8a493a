"""What the README says of tests, settings and files is there."""

import ast
import re
from dataclasses import fields
from pathlib import Path

from mashup_callback import MashupConfig


ROOT = next(path for path in Path(__file__).parents if (path / "setup.cfg").exists())
README = (ROOT / "README.md").read_text()
NAMED = set(re.findall(r"`(?:tests/)?\S+\.py::(\w+)`", README))


def names_of_tests(*paths):
    trees = [ast.parse(path.read_text()) for path in paths]
    functions = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in functions if name.startswith("test_")}


def test_named_tests_exist():
    assert len(NAMED) > 20 and names_of_tests(*(ROOT / "tests").rglob("test_*.py")) >= NAMED


def test_every_launch_mode_is_in_the_table():
    modes = names_of_tests(ROOT / "tests/distributed/test_modes.py")
    # Tests of the tests, and of what must raise, are no modes.
    assert {name for name in modes if not re.search("seen_by|raise", name)} <= NAMED


def test_named_settings_and_files_exist():
    settings = re.search(r"## Settings\n(.*?)\n## ", README, re.DOTALL).group(1)
    names = re.findall(
        r"`(\w+)`", " ".join(row.split("|")[1] for row in settings.splitlines() if row.startswith("| `"))
    )
    assert names and set(names) <= {field.name for field in fields(MashupConfig)}
    for path in re.findall(r"(?:recipes|tests)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path


def test_places_to_change_exist():
    table = re.search(r"## Development\n(.*?)\n## ", README, re.DOTALL).group(1)
    places = re.findall(r"`([\w/]+/|\w+\.py)`", table)
    assert len(places) > 8
    package = ROOT / "mashup_callback"
    for place in places:
        assert list(package.rglob(place)) if place.endswith(".py") else (package / place).is_dir(), place


def test_commands_are_those_of_ci():
    run = (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^    python -m pip install .* && (.*)$", README, re.MULTILINE)
    assert commands == ["python recipes/quickstart/run.py", "python -m pytest"]
    assert all(command in run for command in commands)
