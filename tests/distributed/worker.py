"""
One process of a training run, started by torchrun or alone: `python -m tests.distributed.worker <settings as JSON>`.

It writes `rank<n>.json` into the run's directory: the losses, the report, a checksum of the adapter right after the
mashup, how far that is from the adapter saved, and how many rows the model was given during the mashup.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


DEFAULTS = {
    "mode": "ddp",
    "world": 2,
    "callback": {},
    "trainer": {},
    "lora": {},
    "data": "map",
    "trains": "sft",
    "fault": None,
    "dtype": "float32",
}
SETTINGS = SimpleNamespace(**{**DEFAULTS, **json.loads(sys.argv[1])})
RANK = int(os.environ.get("RANK", 0))
DIRECTORY = Path(SETTINGS.directory)
if SETTINGS.shim:
    from tests.distributed import cpu_shim  # noqa: F401

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from mashup_callback import MashupCallback
from mashup_callback.parameters import clean_name, read_parameters
from tests.distributed.faults import install
from tests.distributed.modes import build_model, prepare, trainer_settings
from tests.tiny import lora, preferences, rows, tokenizer


torch.set_num_threads(1)
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
TRAINER, CONFIG = TRAINERS[SETTINGS.trains]


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


def arguments():
    settings = {
        "output_dir": str(DIRECTORY / "out"),
        # The same global batch of 4 rows however many processes there are.
        "per_device_train_batch_size": 4 // SETTINGS.world,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": SETTINGS.dtype == "bfloat16",
        "disable_tqdm": True,
        "max_length": 32,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return CONFIG(**{**settings, **trainer_settings(SETTINGS.mode, SETTINGS.world), **SETTINGS.trainer})


def train_rows():
    data = rows(count=32) if SETTINGS.trains == "sft" else preferences(32)
    shards = {"map": None, "stream": 1, "shards": 4}[SETTINGS.data]
    return data if shards is None else data.to_iterable_dataset(num_shards=shards)


def main():
    prepare(SETTINGS.mode, SETTINGS.world)
    args = arguments()
    _ = args.device  # starts the process group, which a sharded model needs before it is loaded
    watch = Watch()
    callback = None
    if SETTINGS.callback is not None:
        callback = MashupCallback(SETTINGS.candidates, **SETTINGS.callback)
    trainer = TRAINER(
        model=build_model(SETTINGS.mode, SETTINGS.world, SETTINGS.base, getattr(torch, SETTINGS.dtype)),
        args=args,
        train_dataset=train_rows(),
        processing_class=tokenizer(),
        peft_config=lora(**SETTINGS.lora),
        callbacks=[AtBeginning(watch.begin), *([callback] if callback else []), AtBeginning(watch.end)],
    )
    if callback and SETTINGS.trains != "sft":
        callback.bind(trainer)
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert world == SETTINGS.world, f"{world} processes, expected {SETTINGS.world}"
    install(SETTINGS.fault, RANK)
    trainer.train()
    write_findings(trainer, watch, callback.report if callback else None)
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads now and then keep a process from ending while its DDP model is destroyed.
    sys.stdout.flush()
    os._exit(0)


def write_findings(trainer, watch, report):
    findings = {
        "kind": trainer.accelerator.distributed_type.value,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": watch.rows,
        "held": checksum(watch.held),
        "trained": checksum(watch.read(trainer.model)),
        "saved_difference": difference(watch.held) if RANK == 0 and report and report.decision != "scratch" else None,
        "report": json.loads(report.to_json()) if report else None,
    }
    (DIRECTORY / f"rank{RANK}.json").write_text(json.dumps(findings))


def checksum(values):
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(values[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(held):
    saved = load_file(DIRECTORY / "out/mashup/adapter_model.safetensors")
    named = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
        for name, value in saved.items()
    }
    assert named.keys() == held.keys()
    return max((held[name].float().cpu() - value.float()).abs().max().item() for name, value in named.items())


if __name__ == "__main__":
    main()
