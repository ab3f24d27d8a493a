"""The picture of the design: who imports whom, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mashup_callback


PACKAGE = Path(mashup_callback.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(module):
    """Top-level names that a module imports anywhere in it; its own siblings with a leading dot."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f".{(node.module or '').split('.')[0]}" if node.level else node.module.split(".")[0]


def users(name):
    return {module for module in MODULES if name in set(imports(module))}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("mergekit", {"contracts", "full_merge", "merging", "spaces"}),
        ("trl", {"sft_rows"}),
        ("datasets", {"sft_rows"}),
        (".callback", {"__init__", "cli"}),
    ],
)
def test_who_imports(name, allowed):
    assert users(name) <= allowed


def test_importing_the_package_imports_neither_mergekit_nor_trl():
    code = (
        "import sys, mashup_callback, mashup_callback.callback; "
        "print([name for name in ('mergekit', 'trl', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_public_names_are_there():
    for name in mashup_callback.__all__:
        assert getattr(mashup_callback, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mashup_callback.nothing  # noqa: B018
