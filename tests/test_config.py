"""The settings: their checks, and the same fields from Python, YAML and the command line."""

from dataclasses import FrozenInstanceError, fields

import pytest
from trl import TrlParser

from mashup_callback import MashupConfig


def test_defaults_are_those_of_the_design():
    config = MashupConfig()
    assert (config.top_k, config.sample_size, config.metric, config.merge_method) == (3, 256, "loss", "linear")
    assert (config.merge_space, config.weights, config.search, config.guard) == ("delta", "equal", "racing", True)
    assert (config.max_candidates, config.max_download_gb, config.seed, config.on_error) == (64, 10.0, 42, "scratch")


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
        ({"guard_dataset": "rows.json"}, TypeError, "Python only"),
        ({"weights": "best"}, ValueError, "softmax"),
        ({"weights": [1, float("nan"), 1]}, ValueError, "finite"),
        ({"weights": [1, 2]}, ValueError, "top_k"),
        ({"merge_parameters": "{"}, ValueError, "JSON"),
        ({"merge_parameters": 3}, TypeError, "mapping"),
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


def test_conversions():
    assert MashupConfig(top_k="4").top_k == 4 and MashupConfig(top_k="auto").top_k == "auto"
    assert MashupConfig(weights="[2, 1, 1]").weights == MashupConfig(weights=(2, 1, 1)).weights == (2.0, 1.0, 1.0)
    assert MashupConfig(merge_method="ties", merge_parameters='{"density": 0.5}').merge_parameters == {"density": 0.5}


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        MashupConfig().top_k = 1


def test_unknown_setting_names_the_nearest():
    with pytest.raises(TypeError, match="`merge_metod`. Did you mean `merge_method`"):
        MashupConfig.from_settings(None, {"merge_metod": "ties"})
    with pytest.raises(TypeError, match="The settings are top_k"):
        MashupConfig.from_settings(None, {"zzz": 1})


def test_yaml_and_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "top_k: auto\nmerge_method: ties\nmerge_parameters: '{\"density\": 0.3}'\nweights: softmax\n"
        "allow_licenses: [mit, apache-2.0]\nmax_seconds: 60\n"
    )
    parser = TrlParser([MashupConfig])
    (config,) = parser.parse_args_and_config(["--config", str(recipe), "--sample_size", "64", "--no_guard"])
    assert (config.top_k, config.merge_method, config.merge_parameters) == ("auto", "ties", {"density": 0.3})
    assert (config.sample_size, config.guard, config.max_seconds) == (64, False, 60)
    assert config.allow_licenses == ["mit", "apache-2.0"]


def test_to_dict_is_json():
    import json

    config = MashupConfig(metric=len, guard_dataset=[1, 2])
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == {field.name for field in fields(MashupConfig)}
    assert (values["metric"], values["guard_dataset"]) == ("len", "2 rows")
