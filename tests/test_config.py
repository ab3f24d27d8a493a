"""The settings: their checks, and the same fields from Python, YAML and the command line."""

import dataclasses
import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import transformers
import trl
from transformers import HfArgumentParser
from trl import TrlParser

from mashup_callback import MashupArguments, MashupCallback, MashupConfig


def test_defaults_are_those_of_the_design():
    config = MashupConfig()
    assert (config.top_k, config.sample_size, config.metric, config.merge_method) == (3, "auto", "loss", "linear")
    assert (config.merge_space, config.weights, config.search, config.guard) == ("delta", "equal", "racing", True)
    assert (config.max_candidates, config.max_download_gb, config.seed, config.on_error) == (64, 10.0, None, "scratch")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": "many"}, ValueError, '"auto"'),
        ({"top_k": 1.5}, ValueError, "whole number"),
        ({"sample_size": 1}, ValueError, "at least 2"),
        ({"sample_size": "256"}, TypeError, "whole number"),
        ({"metric": "los"}, ValueError, "Did you mean 'loss'"),
        ({"search": "halving"}, ValueError, "'racing', 'exhaustive'"),
        ({"merge_space": "deltas"}, ValueError, "Did you mean 'delta'"),
        ({"on_error": "ignore"}, ValueError, "'scratch', 'raise'"),
        ({"guard": 1}, TypeError, "True or False"),
        ({"allow_licenses": "mit"}, TypeError, "list of strings"),
        ({"guard_dataset": "rows.json"}, TypeError, "expected rows"),
        pytest.param({"guard_dataset": iter([])}, TypeError, "expected rows", id="guard_dataset is a stream"),
        ({"guard_dataset": {"train": [], "test": []}}, TypeError, "expected rows"),
        ({"weights": "best"}, ValueError, "softmax"),
        ({"weights": [1, float("nan"), 1]}, ValueError, "finite"),
        ({"weights": [1, 2]}, ValueError, "top_k"),
        ({"weights": "2,1,1"}, ValueError, "finite numbers"),
        ({"merge_parameters": "{}"}, TypeError, "mapping"),
        ({"top_k": True}, ValueError, "whole number"),
        ({"top_k": "4"}, ValueError, "whole number"),
        ({"seed": -1}, ValueError, "at least 0"),
        ({"merge_parameters": {"densty": 0.5}, "merge_method": "ties"}, ValueError, "density"),
        ({"merge_method": "tiess"}, ValueError, "ties"),
        ({"merge_method": "nearswap", "top_k": 2}, ValueError, "'?t'?"),
        ({"max_seconds": -1}, ValueError, "at least 0"),
        ({"max_download_gb": float("inf")}, ValueError, "finite"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"min_kept_energy": 1.5}, ValueError, "share of at most 1"),
        ({"min_kept_energy": -0.1}, ValueError, "at least 0"),
        ({"guard_margin": -1.0}, ValueError, "at least 0"),
        ({"guard_margin": float("nan")}, ValueError, "finite"),
    ],
    ids=str,
)
def test_bad_values_say_what_to_do(settings, error, message):
    with pytest.raises(error, match=message):
        MashupConfig(**settings)


def test_weights_are_numbers():
    assert MashupConfig(weights=[2, 1, 1]).weights == MashupConfig(weights=(2, 1, 1)).weights == (2.0, 1.0, 1.0)


def test_seed_is_the_trainers_unless_set():
    assert MashupConfig().resolved(7).seed == 7
    assert MashupConfig(seed=3, top_k=2).resolved(7) == MashupConfig(seed=3, top_k=2)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        MashupConfig().top_k = 1


def test_unknown_setting_names_the_nearest():
    with pytest.raises(TypeError, match="`merge_metod`. Did you mean `merge_method`"):
        MashupConfig.from_settings(None, {"merge_metod": "ties"})
    with pytest.raises(TypeError, match="The settings are top_k"):
        MashupConfig.from_settings(None, {"zzz": 1})


def parsed(tmp_path, yaml, *arguments):
    (tmp_path / "recipe.yaml").write_text(yaml)
    (found,) = TrlParser([MashupArguments]).parse_args_and_config(
        ["--config", str(tmp_path / "recipe.yaml"), *arguments]
    )
    return found


def test_yaml_and_command_line(tmp_path):
    config = parsed(
        tmp_path,
        "mashup_top_k: auto\nmashup_merge_method: ties\nmashup_merge_parameters: {density: 0.3}\n"
        "mashup_weights: softmax\nmashup_allow_licenses: [mit, apache-2.0]\nmashup_max_seconds: 60\n",
        *("--mashup_sample_size", "64", "--no_mashup_guard", "--mashup_seed", "5"),
    ).config()
    assert (config.top_k, config.merge_method, config.merge_parameters) == ("auto", "ties", {"density": 0.3})
    assert (config.sample_size, config.guard, config.max_seconds, config.seed) == (64, False, 60, 5)
    assert config.allow_licenses == ["mit", "apache-2.0"]


@pytest.mark.parametrize("weights", ["2,1,1", "[2, 1, 1]"])
def test_texts_of_a_command_line(tmp_path, weights):
    arguments = ("--mashup_top_k", "3", "--mashup_weights", weights, "--mashup_merge_parameters", '{"density": 0.5}')
    config = parsed(tmp_path, "mashup_merge_method: ties\n", *arguments).config()
    assert (config.top_k, config.weights, config.merge_parameters) == (3, (2.0, 1.0, 1.0), {"density": 0.5})
    yaml = f"mashup_weights: {weights}\nmashup_top_k: 3\nmashup_merge_method: linear\n"
    assert parsed(tmp_path, yaml).config().weights == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mashup_merge_parameters": "{"}, "not valid JSON"),
        ({"mashup_top_k": "1.5"}, "whole number"),
        ({"mashup_top_k": "-1"}, "whole number"),
        ({"mashup_weights": "best"}, "softmax"),
        ({"mashup_weights": "1,x,2"}, "finite numbers"),
    ],
)
def test_bad_texts_say_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        MashupArguments(**settings).config()


def test_a_choice_that_the_command_line_does_not_have(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser([MashupArguments]).parse_args_into_dataclasses(["--mashup_merge_space", "deltas"])
    assert "delta" in capsys.readouterr().err


def test_help_says_what_the_docstring_says(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser([MashupArguments]).parse_args_into_dataclasses(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "within 5% of the run's own forward and backward work" in shown
    assert all(field.metadata["help"] for field in fields(MashupArguments))


def test_arguments_are_the_settings():
    names = {field.name for field in fields(MashupConfig)} - {"guard_dataset"} | {"candidates"}
    assert {field.name for field in fields(MashupArguments)} == {f"mashup_{name}" for name in names}
    assert MashupArguments().config() == MashupConfig()


def test_arguments_make_the_callback(tmp_path):
    assert MashupArguments().callback() is None
    callback = MashupArguments(mashup_candidates=[str(tmp_path / "*")], mashup_top_k="2").callback()
    assert isinstance(callback, MashupCallback)
    assert (callback.specs, callback.config) == ((str(tmp_path / "*"),), MashupConfig(top_k=2))


def neighbours():
    """Every dataclass of arguments that trl and transformers export."""
    for module in (trl, transformers):
        for name in sorted(dir(module)):
            if name.endswith(("Config", "Arguments")) and "Mixture" not in name:
                found = getattr(module, name)
                # transformers has a configuration of every model beside its arguments.
                if dataclasses.is_dataclass(found) and (module is trl or name.endswith("TrainingArguments")):
                    yield pytest.param(found, id=name)


@pytest.mark.parametrize("neighbour", neighbours())
@pytest.mark.parametrize("way", ["command line", "yaml"])
def test_arguments_fit_beside_any_others(tmp_path, neighbour, way):
    """Defaults need no GPU: what the neighbour makes of its own fields is not looked at."""
    own = {"mashup_candidates": [str(tmp_path / "*")], "mashup_top_k": 2, "mashup_seed": 5}
    given, required = dict(own), [item.name for item in fields(neighbour) if _is_required(item)]
    given |= dict.fromkeys(required, str(tmp_path))
    names = {item.name for item in fields(neighbour)}
    given |= {name: value for name, value in {"use_cpu": True, "bf16": False}.items() if name in names}
    if way == "yaml":
        (tmp_path / "recipe.yaml").write_text(json.dumps(given))
        arguments = ["--config", str(tmp_path / "recipe.yaml")]
    else:
        values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        arguments = [word for name, value in values.items() for word in (f"--{name}", *map(str, value))]
    other, mashup = TrlParser([neighbour, MashupArguments]).parse_args_and_config(arguments)
    assert isinstance(other, neighbour)
    assert mashup.callback().config == MashupConfig(top_k=2, seed=5)
    assert mashup.callback().specs == (*own["mashup_candidates"],)


def _is_required(item):
    return item.init and item.default is item.default_factory is dataclasses.MISSING


def test_to_dict_is_json():
    config = MashupConfig(metric=len, guard_dataset=[1, 2], report_dir=Path("out"))
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == {field.name for field in fields(MashupConfig)}
    assert (values["metric"], values["guard_dataset"]) == ("len", "2 rows")
