"""A training run of one case, in one of several processes or alone, and what is found out about it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, set_seed

from mashup_callback import MashupCallback, MashupReport
from mashup_callback.model.parameters import clean_name, read_parameters
from tests.distributed.faults import installed
from tests.distributed.modes import build_model, mode_settings
from tests.tiny import lora, losses, preferences, rows, tokenizer, trainer_settings


TRAINERS = {"sft": "SFT", "dpo": "DPO", "full": "SFT"}
# gloo's threads now and then hang while a DDP model is destroyed.
KEPT = []


class Watch:
    """Counts the rows of forward passes during the mashup, and looks at the adapter right after it."""

    def __init__(self):
        self.rows, self.held = 0, {}

    def begin(self, model):
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, args, kwargs):
        self.rows += len(kwargs["input_ids"])

    def end(self, model):
        self.handle.remove()
        self.held = self.read(model)

    @staticmethod
    def read(model):
        names = {clean_name(name) for name, _ in model.named_parameters()}
        return read_parameters(model, sorted(name for name in names if "lora_" in name))


class AtBeginning(TrainerCallback):
    def __init__(self, function):
        self.function = function

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.function(model)


def train(
    directory: str,
    base: str,
    candidates: str | list[str],
    *,
    mode: str = "ddp",
    world: int = 1,
    rank: int = 0,
    trains: str = "sft",
    callback: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    lora_config: dict[str, Any] | None = None,
    data: str = "map",
    fault: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """
    Trains, and returns the losses, the report, a checksum of the adapter right after the mashup, how far that is from
    the adapter saved, and how many rows the model was given during the mashup.
    """
    set_seed(0)
    own = {"output_dir": str(Path(directory) / "out"), "bf16": dtype == "bfloat16"}
    # The same global batch of 4 rows however many processes there are.
    own |= {"per_device_train_batch_size": 4 // world, **mode_settings(mode, world), **(trainer or {})}
    args = getattr(trl, f"{TRAINERS[trains]}Config")(**trainer_settings(**own))
    _ = args.device  # starts the process group, which a sharded model needs before it is loaded
    watch, mashup = Watch(), None
    if callback is not None:
        mashup = MashupCallback(candidates, **callback)
    running = getattr(trl, f"{TRAINERS[trains]}Trainer")(
        model=build_model(mode, world, base, getattr(torch, dtype), full=trains == "full"),
        args=args,
        train_dataset=train_rows(trains, data),
        processing_class=tokenizer(),
        peft_config=None if trains == "full" else lora(**(lora_config or {})),
        callbacks=[AtBeginning(watch.begin), *([mashup] if mashup else []), AtBeginning(watch.end)],
    )
    KEPT.append(running)
    if mashup and trains == "dpo":
        mashup.bind(running)
    found = dist.get_world_size() if dist.is_initialized() else 1
    assert found == world, f"{found} processes, expected {world}"
    with installed(fault, rank):
        running.train()
    return findings(running, watch, mashup.report if mashup else None, Path(directory) if rank == 0 else None)


def train_rows(trains: str, data: str) -> Any:
    found = preferences(32) if trains == "dpo" else rows(count=200 if data == "many" else 32)
    shards = {"map": None, "many": None, "stream": 1, "shards": 4}[data]
    return found if shards is None else found.to_iterable_dataset(num_shards=shards)


def findings(trainer: Trainer, watch: Watch, report: MashupReport | None, directory: Path | None) -> dict[str, Any]:
    compare = directory and watch.held and report and report.decision != "scratch"
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "losses": losses(trainer),
        "rows": watch.rows,
        "held": checksum(watch.held),
        "trained": checksum(watch.read(trainer.model)),
        "saved_difference": difference(watch.held, directory) if compare else None,
        "report": json.loads(report.to_json()) if report else None,
    }


def checksum(values: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(values[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(held: dict[str, torch.Tensor], directory: Path) -> float:
    saved = load_file(directory / "out/mashup/adapter_model.safetensors")
    named = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
        for name, value in saved.items()
    }
    assert named.keys() == held.keys()
    return max((held[name].float().cpu() - value.float()).abs().max().item() for name, value in named.items())
