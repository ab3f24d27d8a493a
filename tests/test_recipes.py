"""Every recipe parses; those for a laptop run, and so does the notebook."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import TrlParser

from mashup_callback import MashupReport
from recipes import sft
from recipes.quickstart import world


RECIPES = Path(__file__).parent.parent / "recipes"
SFT = sorted((RECIPES / "sft").glob("*.yaml"))
ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", [*SFT, *ACCELERATE], ids=lambda path: path.name)
def test_recipe_starts_with_its_own_launch_command(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = next(shlex.split(line.lstrip("# ")) for line in comments if "recipes/sft.py" in line)
    named = [Path(word) for word in command if word.endswith((".yaml", ".py"))]
    assert path.relative_to(RECIPES.parent) in named
    assert all((RECIPES.parent / file).exists() for file in named)


@pytest.mark.parametrize("path", SFT, ids=lambda path: path.name)
def test_recipe_parses(path):
    settings = yaml.safe_load(path.read_text())
    _, training, model, mashup = TrlParser(sft.CONFIGS).parse_args_and_config(
        ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    )
    assert mashup.mashup_candidates == settings["mashup_candidates"]
    assert model.model_name_or_path == settings["model_name_or_path"]
    assert training.learning_rate == settings["learning_rate"]
    assert mashup.config().max_candidates == settings.get("mashup_max_candidates", 64)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_launch_configuration_is_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes in (8, 16) and config.mixed_precision == "bf16"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The root of the clone, where the recipes' commands run; what they write goes elsewhere."""
    monkeypatch.chdir(RECIPES.parent)
    return tmp_path


def test_laptop_recipe_trains_from_a_mashup_on_the_data_that_the_script_writes(clone):
    runpy.run_path("recipes/sft/data.py")["main"](["smallest", "--output-dir", str(clone / "data")])
    texts = [(clone / f"data/smallest/{split}.jsonl").read_text() for split in ("test", "train")]
    test, train = ({json.loads(row)["prompt"] for row in text.splitlines()} for text in texts)
    assert train and test and not test & train
    changed = {"dataset_name": clone / "data/smallest", "output_dir": clone / "out", "max_steps": 1, "seed": 7}
    changed |= {"mashup_top_k": 2, "mashup_sample_size": 32, "per_device_train_batch_size": 4}
    words = [str(word) for name, value in changed.items() for word in (f"--{name}", value)]
    sft.main(["--config", "recipes/sft/laptop.yaml", *words])
    report = MashupReport.load(clone / "out/mashup")
    assert report.decision in ("merged", "single")
    assert (report.config["top_k"], report.config["seed"]) == (2, 7)
    names = {Path(row.name).name for row in report.candidates}
    assert names == set(world.TASKS) - {"smallest"} and not any(row.warnings for row in report.candidates)
    assert (clone / "out/adapter_model.safetensors").exists()


def test_every_file_that_a_recipe_names_is_made_by_the_script():
    known = runpy.run_path(str(RECIPES / "sft/data.py"))
    for path in SFT:
        task = yaml.safe_load(path.read_text())["dataset_name"].removeprefix("data/")
        assert task in (*known["BENCHMARKS"], *world.TASKS)
        assert f"recipes/sft/data.py {task}" in path.read_text()


def test_notebook_runs_and_is_small(tmp_path, monkeypatch):
    path = RECIPES / "quickstart/quickstart.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size < 20_000
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"] == list(range(1, len(code) + 1))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in code:
        exec(cell.replace('steps = "smallest", 40', 'steps = "smallest", 2'), names)
    assert names["report"].decision == "merged" and names["steps"] == 2
    assert 0 <= names["from_scratch"] <= 1 and 0 <= names["from_mashup"] <= 1
