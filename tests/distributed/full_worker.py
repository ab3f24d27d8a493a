"""One process of a full fine-tuning run: `python -m tests.distributed.full_worker <settings as JSON>`."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


SETTINGS = SimpleNamespace(**json.loads(sys.argv[1]))
RANK, DIRECTORY = int(os.environ.get("RANK", 0)), Path(SETTINGS.directory)
if SETTINGS.shim:
    from tests.distributed import cpu_shim  # noqa: F401

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from mashup_callback import MashupCallback
from tests.distributed.modes import build_model, prepare, trainer_settings
from tests.tiny import rows, tokenizer


torch.set_num_threads(1)


def main():
    prepare(SETTINGS.mode, SETTINGS.world)
    args = SFTConfig(
        output_dir=str(DIRECTORY / "out"),
        per_device_train_batch_size=4 // SETTINGS.world,
        max_steps=3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=False,
        disable_tqdm=True,
        max_length=32,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **trainer_settings(SETTINGS.mode, SETTINGS.world),
    )
    _ = args.device  # starts the process group, which a sharded model needs before it is loaded
    if SETTINGS.mode in ("native", "zero3") and SETTINGS.world > 1:
        model = build_model(SETTINGS.mode, SETTINGS.world, SETTINGS.base, torch.float32)
    else:
        model = LlamaForCausalLM.from_pretrained(SETTINGS.base, dtype=torch.float32)
    callback = (
        MashupCallback(SETTINGS.candidates, on_error="raise", **SETTINGS.callback) if SETTINGS.candidates else None
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows(count=32),
        processing_class=tokenizer(),
        callbacks=[callback] if callback else [],
    )
    assert (dist.get_world_size() if dist.is_initialized() else 1) == SETTINGS.world
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    decision = callback.report.decision if callback else None
    (DIRECTORY / f"rank{RANK}.json").write_text(json.dumps({"losses": losses, "decision": decision}))
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads now and then keep a process from ending while its DDP model is destroyed.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
