"""Plugins for other trainers, against stubs of their interfaces that call in their order."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from pydantic import BaseModel, ConfigDict

from mashup_callback import MashupCallback
from tests.tiny import sft_trainer


RECIPES = Path(__file__).parent.parent / "recipes/integrations"


def stub(monkeypatch, name, **values):
    """Makes a module, with its packages, importable."""
    *packages, _ = [name.rsplit(".", count)[0] for count in range(name.count("."), -1, -1)]
    for package in packages:
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    module = ModuleType(name)
    vars(module).update(values)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Configuration(dict):
    """Like axolotl's: what is not set is None."""

    __getattr__ = dict.get


@pytest.fixture
def plugin(monkeypatch):
    stub(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    monkeypatch.delitem(sys.modules, "mashup_callback.integrations.axolotl", raising=False)
    # As axolotl loads what its YAML names.
    module, name = ["mashup_callback.integrations.axolotl", "MashupPlugin"]
    yield getattr(importlib.import_module(module), name)()
    sys.modules.pop(module)


def validated(plugin, **values):
    """The configuration after axolotl's check: its own model, with the fields of the plugin's beside its own."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(importlib.import_module(module), name)

    class Axolotl(BaseModel):
        model_config = ConfigDict(extra="forbid")
        base_model: str

    merged = type("AxolotlInputConfig", (Axolotl, arguments), {})
    return Configuration(merged(base_model="x", **values).model_dump(exclude_none=True))


def test_axolotl_trains_from_a_mashup(plugin, tmp_path, library):
    settings = {"mashup_candidates": [str(library / "trained-*")], "mashup_guard": False, "mashup_weights": [2, 1]}
    cfg = validated(plugin, **settings, mashup_top_k=2, mashup_merge_parameters={"normalize": True})
    trainer = sft_trainer(tmp_path / "out")
    [callback] = plugin.add_callbacks_post_trainer(cfg, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report.decision == "merged" and callback.report.config["weights"] == [2.0, 1.0]
    assert (callback.report.config["top_k"], callback.report.config["merge_parameters"]) == (2, {"normalize": True})
    # Bound: the trainer's trackers hear of it.
    assert "mashup/k" in trainer.state.log_history[0]


def test_axolotl_without_candidates_and_with_wrong_settings(plugin, tmp_path):
    assert plugin.add_callbacks_post_trainer(validated(plugin), None) == []
    with pytest.raises(ValueError, match="mashup_topk"):
        validated(plugin, mashup_topk=3)
    cfg = validated(plugin, mashup_candidates=str(tmp_path / "*"), mashup_merge_method="tiess")
    with pytest.raises(ValueError, match="tiess"):
        plugin.add_callbacks_post_trainer(cfg, None)
    cfg = validated(plugin, mashup_candidates=str(tmp_path / "*"), mashup_metric="token_accuracy")
    assert plugin.add_callbacks_post_trainer(cfg, None)[0].specs == (str(tmp_path / "*"),)


def test_ms_swift_makes_its_callback_from_the_map(monkeypatch, tmp_path):
    callbacks = {}
    stub(monkeypatch, "swift.callbacks.mapping", callbacks_map=callbacks)
    monkeypatch.setenv("MASHUP_CANDIDATES", json.dumps([str(tmp_path / "*")]))
    runpy.run_path(str(RECIPES / "ms_swift.py"))
    trainer = SimpleNamespace()
    made = callbacks["mashup"](SimpleNamespace(), trainer)
    assert isinstance(made, MashupCallback) and made.specs == (str(tmp_path / "*"),) and made._trainer is trainer


def test_llama_factory_is_given_the_callback(monkeypatch, tmp_path):
    calls = []
    stub(monkeypatch, "llamafactory.train.tuner", run_exp=lambda **given: calls.append(given))
    monkeypatch.setattr(sys, "argv", ["llama_factory.py", "lora.yaml", str(tmp_path / "*")])
    runpy.run_path(str(RECIPES / "llama_factory.py"), run_name="__main__")
    [call] = calls
    assert sys.argv == ["llama_factory.py", "lora.yaml"] and [*map(type, call["callbacks"])] == [MashupCallback]


def test_unsloth_trains_from_a_mashup(monkeypatch, tmp_path, library):
    """The example as it is, with a tiny model in the place of unsloth's."""
    from tests.tiny import llama, lora, rows, tokenizer, trainer_settings

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(name, **settings):
            return llama(), tokenizer()

        @staticmethod
        def get_peft_model(model, r, **settings):
            from peft import get_peft_model

            return get_peft_model(model, lora(r=r))

    import trl

    config, settings = trl.SFTConfig, trainer_settings(tmp_path / "out")
    monkeypatch.setattr(trl, "SFTConfig", lambda output_dir: config(**settings))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows())
    stub(monkeypatch, "unsloth", FastLanguageModel=FastLanguageModel)
    monkeypatch.setattr(sys, "argv", ["unsloth_sft.py", "base", "train.jsonl", str(library / "trained-*")])
    done = runpy.run_path(str(RECIPES / "unsloth_sft.py"), run_name="__main__")
    assert done["callback"].report.decision in ("merged", "single")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_explained(path):
    assert len(path.read_text().splitlines()) <= 20
    assert path.name in (RECIPES / "README.md").read_text()
