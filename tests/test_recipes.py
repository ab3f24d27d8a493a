"""Every recipe parses, and the script trains a tiny model from a mashup."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import TrlParser

from mashup_callback import MashupReport
from recipes import sft
from tests.tiny import LINEAR, llama, rows, tokenizer


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


def test_script_trains_from_a_mashup(tmp_path, library):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows(count=32))))
    recipe = {
        "model_name_or_path": str(tmp_path / "base"),
        "dtype": "float32",
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": LINEAR,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "mashup_candidates": [str(library / "trained-*")],
        "mashup_top_k": 2,
        "seed": 7,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sft.main(["--config", str(tmp_path / "recipe.yaml")])
    report = MashupReport.load(tmp_path / "out/mashup")
    assert report.decision in ("merged", "single")
    assert (report.config["top_k"], report.config["seed"]) == (2, 7)
    assert (tmp_path / "out/adapter_model.safetensors").exists()
