"""What is in a mashup's directory, and mergekit's configuration among it."""

from dataclasses import replace

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from peft import PeftModel
from transformers import LlamaForCausalLM

from mashup_callback.candidates import find_candidates
from mashup_callback.config import MashupConfig
from mashup_callback.report import CandidateRow, MashupReport
from mashup_callback.sharing.save import mergekit_recipe, save_failure, save_mashup
from mashup_callback.without_trainer import save_merge
from tests.sharing.mashups import FILES, MERGE, REPORT, SHA, SOURCES, write_adapter
from tests.tiny import llama, save_random_adapter


def test_directory_holds_what_was_written_its_card_and_the_report(tmp_path):
    local = replace(REPORT, candidates=(CandidateRow(str(tmp_path / "one"), "scored", loss=1.0, weight=1.0),))
    for report in (REPORT, local):
        save_mashup(tmp_path / "out", report, write_adapter)
        assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"ranking.png"}
        assert MashupReport.load(tmp_path / "out") == report
    # The card is for others from the start, the other two are for this machine.
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()
    assert str(tmp_path / "one") in (tmp_path / "out/mergekit.yaml").read_text()


def test_nothing_written_has_no_card(tmp_path):
    for write in (None, lambda draft: None):
        save_mashup(tmp_path / "out", replace(REPORT, candidates=()), write)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_failed_write_leaves_the_earlier_mashup(tmp_path):
    save_mashup(tmp_path / "out", REPORT, write_adapter)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(draft):
        (draft / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_mashup(tmp_path / "out", REPORT, fail)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    save_failure(tmp_path / "out", replace(REPORT, decision="scratch", reason="failed"))
    assert MashupReport.load(tmp_path / "out") == REPORT
    assert MashupReport.load(tmp_path / "out/failed.json").reason == "failed"


@pytest.mark.parametrize(
    ("method", "parameters", "base"),
    [
        ("linear", {}, None),
        ("ties", {"density": 0.5}, "acme/base"),
        ("ties", {"density": [0.5, 0.25]}, "acme/base"),
        ("slerp", {"t": 0.25}, f"acme/base+acme/one@{SHA}"),
        ("karcher", {}, None),
    ],
)
def test_mergekit_reads_its_configuration(method, parameters, base):
    rows = (SOURCES[0], replace(SOURCES[0], name="acme/two", weight=0.25))
    report = replace(REPORT, merge=replace(MERGE, method=method, parameters=parameters), candidates=rows)
    config = MergeConfiguration.model_validate(yaml.safe_load(mergekit_recipe(report)))
    assert config.merge_method == method
    assert [str(entry.model) for entry in config.models] == [f"acme/base+acme/{x}@{SHA}" for x in ("one", "two")]
    assert (config.base_model and str(config.base_model)) == base
    values = [entry.parameters or {} for entry in config.models]
    if method in ("linear", "ties"):
        assert [value["weight"] for value in values] == [0.75, 0.25]
    for name, value in parameters.items():
        if isinstance(value, list):
            assert [own[name] for own in values] == value
        else:
            assert config.parameters[name] == value


def test_nothing_merged_has_no_configuration():
    assert mergekit_recipe(replace(REPORT, merge=None)) is None
    assert mergekit_recipe(replace(REPORT, candidates=SOURCES[2:])) is None


def test_mergekit_runs_its_configuration_to_the_same_model(tmp_path):
    """mergekit's own run of mergekit.yaml equals the base with our adapter, where no rank is cut."""
    llama().save_pretrained(tmp_path / "base")
    for seed in range(2):
        save_random_adapter(tmp_path / f"runs/{seed}", seed, base=llama(name_or_path=str(tmp_path / "base")))
    config = MashupConfig(top_k=2, weights=[0.75, 0.25])
    save_merge(tmp_path / "merged", find_candidates(str(tmp_path / "runs/*")), config, rank=8)
    recipe = yaml.safe_load((tmp_path / "merged/mergekit.yaml").read_text())
    options = MergeOptions(copy_tokenizer=False, quiet=True, lora_merge_cache=str(tmp_path / "cache"))
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "full"), options)
    full = LlamaForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).state_dict()
    ours = PeftModel.from_pretrained(llama(), tmp_path / "merged").merge_and_unload().state_dict()
    untouched = llama().state_dict()
    assert set(full) == set(ours)
    for name, tensor in full.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)
    assert (ours["model.layers.0.mlp.up_proj.weight"] - untouched["model.layers.0.mlp.up_proj.weight"]).norm() > 0.1
