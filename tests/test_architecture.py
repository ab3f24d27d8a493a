"""The order of imports, what importing the package costs, and what a wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mashup_callback


PACKAGE = Path(mashup_callback.__file__).parent
ROOT = PACKAGE.parent
# A module imports from the rows above, from its own folder, and from single modules named before it in its row.
ROWS = (
    ("errors", "names", "display", "typed_json", "report", "factors", "lowrank", "model/"),
    ("distributed", "progress", "methods", "formats/"),
    ("config", "storage", "swap", "candidates/"),
    ("lora/", "full/", "sharing/"),
    ("trainee",),
    ("scoring/",),
    ("selection", "guard", "verification"),
    ("pipeline",),
    ("callback", "arguments", "integrations/", "without_trainer", "cli_rows", "cli_output", "cli"),
    ("__init__",),
)
OWNERS = {
    "mergekit": {"methods.py", "lora/merge.py", "full/merge.py"},
    "huggingface_hub": {"candidates/", "sharing/"},
    "trl": {"cli_rows.py"},
    "datasets": {"cli_rows.py"},
    "torch.distributed": {"distributed.py", "model/parameters.py"},
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(file):
    """Every module that a file imports, lazily and for types too, by its full name."""
    here = ("mashup_callback", *file.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else ()
            name = ".".join((*start, node.module) if node.module else start)
            yield from (f"{name}.{alias.name}" for alias in node.names)


def targets(file):
    """The files of the package among them."""
    found = set()
    for name in imported(file):
        first, *parts = name.split(".")
        # The last part may be a name in the module.
        ends = [Path(*parts[:length]) for length in (len(parts), len(parts) - 1)] if first == "mashup_callback" else []
        paths = [path for end in ends for path in (end.with_suffix(".py") if end.name else end, end / "__init__.py")]
        found |= set([path for path in paths if path in FILES][:1])
    return found - {file}


GRAPH = {file: targets(file) for file in FILES}


def place(file):
    name = f"{file.parts[0]}/" if len(file.parts) > 1 else file.stem
    rows = [(number, row.index(name)) for number, row in enumerate(ROWS) if name in row]
    assert rows, f"{file} has no row"
    return *rows[0], name


def may_import(source, target):
    (row, position, own), (lower, earlier, other) = place(source), place(target)
    return lower < row or own == other or (lower == row and earlier < position and not other.endswith("/"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file):
    assert not [str(target) for target in sorted(GRAPH[file]) if not may_import(file, target)]


def test_no_circle_of_files():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(map(str, error.args[1])))


def test_modules_import_few_others():
    """Files that know one another; an import from a folder's face binds to the folder and not to a file."""
    files = [file for file in FILES if file.name != "__init__.py"]
    arrows = [target for file in files for target in GRAPH[file] if target.name != "__init__.py"]
    assert len(arrows) / len(files) <= 3


@pytest.mark.parametrize("name", OWNERS)
def test_owners_of_libraries(name):
    def uses(file):
        return any(f"{other}.".startswith(f"{name}.") for other in imported(file))

    owners = tuple(OWNERS[name])
    assert not [str(file) for file in FILES if uses(file) and not str(file).startswith(owners)]


def test_files_are_short():
    folders = (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "recipes")
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 320]


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


def test_a_wheel_holds_every_module(tmp_path):
    """Built without a network; unpacked alone, so that nothing comes from this checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    # A copy, since setuptools leaves build/ beside the sources.
    sources = tmp_path / "sources"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        sources.mkdir(exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    for file in (*FILES, Path("py.typed")):
        (sources / "mashup_callback" / file).parent.mkdir(parents=True, exist_ok=True)
        (sources / "mashup_callback" / file).write_bytes((PACKAGE / file).read_bytes())
    subprocess.run([*pip, "wheel", *options, str(sources)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), wheel], check=True)
    names = [".".join(("mashup_callback", *file.with_suffix("").parts)).removesuffix(".__init__") for file in FILES]
    code = (
        "import importlib, sys; from types import ModuleType; sys.path.insert(0, sys.argv[1])\n"
        # The plugins import the tools that load them, which are not installed here.
        "for name in ('axolotl', 'axolotl.integrations', 'axolotl.integrations.base'):\n"
        "    sys.modules[name] = ModuleType(name)\n"
        "sys.modules[name].BasePlugin = object\n"
        "found = [importlib.import_module(name).__file__ for name in sys.argv[2:]]\n"
        "assert all(path.startswith(sys.argv[1]) for path in found), found"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", code, tmp_path / "site", *names], check=True, cwd=tmp_path, env=clean)
    with zipfile.ZipFile(wheel) as archive:
        assert "mashup_callback/py.typed" in archive.namelist()
