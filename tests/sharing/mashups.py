"""A report of a merge of adapters of the Hub, and a mashup's directory as a run leaves it."""

import torch

from mashup_callback.lora import save_adapter
from mashup_callback.lowrank import LoraFactors
from mashup_callback.report import CandidateRow, MashupReport, MergeInfo
from mashup_callback.sharing.save import describe
from tests.tiny import llama, save_random_adapter


SHA = "0123456789abcdef0123456789abcdef01234567"
MERGE = MergeInfo("linear", "delta", {}, 4, 0.98765, {"q": 0.98765}, 0.0, (), "0.1.5")
SOURCES = (
    CandidateRow("acme/one", "scored", SHA, loss=1.25, weight=0.75, license="mit", datasets=("acme/arc", "other")),
    CandidateRow("acme/two/sub/folder", "scored", SHA, loss=1.5, weight=0.25, license="mit"),
    CandidateRow("acme/three", "eliminated", SHA, loss=2.0, license="gpl"),
)
REPORT = MashupReport(
    decision="merged",
    reason="0.5 below a fresh initialization",
    base_loss=2.0,
    merged_loss=1.4321,
    single_loss=1.5432,
    candidates=SOURCES,
    merge=MERGE,
    base_model="acme/base",
    config={"seed": 7, "base_model": None, "metric": "loss"},
)
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mergekit.yaml", "report.json"}


def write_adapter(directory):
    factors = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)
    save_adapter(directory, {"q": factors}, base_model="acme/base", task_type="CAUSAL_LM")


def write_mashup(directory, report=REPORT, base_model="acme/base"):
    """A mashup's directory as a run leaves it."""
    save_random_adapter(directory, 5, base=llama(name_or_path=base_model))
    describe(directory, report)
    report.save(directory / "report.json")
    return directory
