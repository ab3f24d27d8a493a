"""What the READMEs say of tests, settings and files is there, and their code, and that of docstrings, runs."""

import ast
import inspect
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import trl
import typer
from peft import LoraConfig

import mashup_callback
from mashup_callback import MashupArguments, MashupCallback, MashupConfig
from mashup_callback.cli import app
from tests.lora.test_trainees import CONFIGURED, TRAINEES
from tests.lora.variants import CANDIDATES
from tests.tiny import llama, rows, sft_trainer


ROOT = next(path for path in Path(__file__).parents if (path / "setup.cfg").exists())
PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.md"))]
README = PAGES[0].read_text()
NAMED = {name for page in PAGES for name in re.findall(r"`(?:tests/)?\S+\.py::(\w+)`", page.read_text())}


def docstrings(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DOCUMENTED)]
    return "\n".join(inspect.cleandoc(ast.get_docstring(node) or "") for node in nodes)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
TEXTS = {page: page.read_text() for page in PAGES}
TEXTS |= {path: docstrings(path) for path in sorted((ROOT / "mashup_callback").rglob("*.py"))}
BLOCKS = [
    pytest.param(code, id=f"{path.relative_to(ROOT)}:{number}")
    for path, text in TEXTS.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
]
LINES = [line for page in PAGES for line in re.findall(r"^    mashup .*", TEXTS[page], re.MULTILINE)]


@pytest.fixture
def user(library, tmp_path, monkeypatch):
    """What a user has who reads: adapters below runs/, a model, data, and the names that a script imports."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b", "last")):
        shutil.copytree(library / f"trained-{number}", tmp_path / "runs" / name)
    given = ["train", "--output_dir", "out", "--use_cpu", "--bf16", "false", "--mashup_candidates", "runs/*"]
    monkeypatch.setattr("sys.argv", given)

    def trainer(model=None, args=None, train_dataset=None, peft_config=None, callbacks=()):
        """One step of the tiny model, whatever the arguments are; DPO's own is in test_trainers."""
        config = {"peft_config": peft_config} if isinstance(peft_config, LoraConfig) else {}
        return sft_trainer(tmp_path / "out", callbacks=list(callbacks), max_steps=1, **config)

    names = {name: getattr(trl, name) for name in ("TrlParser", "ScriptArguments", "SFTConfig", "ModelConfig")}
    names |= {name: getattr(mashup_callback, name) for name in mashup_callback.__all__}
    names |= {"SFTTrainer": trainer, "DPOTrainer": trainer, "LoraConfig": LoraConfig, "model": llama(), "args": None}
    batch = dict(zip(("input_ids", "labels"), [llama().dummy_inputs["input_ids"] % 80] * 2, strict=True))
    return names | {"dataset": rows(), "batches": [batch], "mean_reward": lambda model, rows: 0.0}


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs(code, user):
    exec(code, user)
    if "trainer.train()" in code:
        [callback] = [one for one in user["trainer"].callback_handler.callbacks if isinstance(one, MashupCallback)]
        assert len(callback.report.candidates) == (3 if callback.config.top_k == 3 else 1) and callback.report.reason
        assert not [row for row in callback.report.candidates if row.status in ("rejected", "failed")]
    if "score_candidates(" in code:
        assert [score.status for score in user["scores"]] == ["scored"] * 3
        assert Path("merged/adapter_model.safetensors").is_file()
    if "TrlParser" in code:
        assert isinstance(user["mashup"], MashupArguments) and user["callback"].specs


def test_blocks_are_found():
    assert len(BLOCKS) >= 8 and len(LINES) >= 6


@pytest.mark.parametrize("command", LINES)
def test_commands_are_understood(command):
    """They are parsed and not run, as most need the Hub; tests/cli runs each of them."""
    _, name, *words = shlex.split(command)
    typer.main.get_command(app).commands[name].make_context(name, words)


def variants_table():
    """What is tested of the kinds of adapters, as Markdown."""
    trained = {name: outcome for name, (*_, outcome) in (TRAINEES | CONFIGURED).items()}
    rows = ["| | as a candidate | as the adapter that is trained |", "|---|---|---|"]
    for outcome in ("exact", "dense", "rejected"):
        cells = ([name for name in kinds if kinds[name].startswith(outcome)] for kinds in (CANDIDATES, trained))
        rows.append(f"| {outcome} | {' | '.join('; '.join(names) for names in cells)} |")
    return "\n".join(rows)


def test_the_table_of_variants_is_that_of_the_tests():
    assert README.partition("<!-- variants -->\n")[2].partition("\n<!-- /variants -->")[0] == variants_table()


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
    for page, text in TEXTS.items():
        for path in re.findall(r"(?<![\w/.-])(?:recipes|tests)/[\w./-]+\w", text if page in PAGES else ""):
            assert (ROOT / path).exists(), (page, path)
        for path in re.findall(r"\]\((?!http)([^)#]+)", text if page in PAGES else ""):
            assert (page.parent / path).exists(), (page, path)


def test_places_to_change_exist():
    table = re.search(r"## Development\n(.*?)\n## ", README, re.DOTALL).group(1)
    places = re.findall(r"`([\w/]+/|\w+\.py)`", table)
    assert len(places) > 8
    package = ROOT / "mashup_callback"
    for place in places:
        assert list(package.rglob(place)) if place.endswith(".py") else (package / place).is_dir(), place


def test_extras_exist():
    known = set(
        re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2], re.M)
    )
    named = {name for text in TEXTS.values() for name in re.findall(r"install .*-e \"\.\[(\w+)\]\"", text)}
    assert {"recipes", "test"} <= named <= known and "install mashup-callback" not in README


def test_commands_are_those_of_ci():
    run = (ROOT / ".ci/run").read_text()
    commands = re.findall(r"^    python -m pip install .* && (.*)$", README, re.MULTILINE)
    assert commands == ["python recipes/quickstart/run.py", "python -m pytest"]
    assert all(command in run for command in commands)
