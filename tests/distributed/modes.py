"""The ways to spread a training run over processes: what the Trainer's arguments and the model are in each."""

import importlib.util
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.tiny import llama


has_deepspeed = importlib.util.find_spec("deepspeed") is not None
# Modes that accelerate offers on accelerators only, so that a CPU needs the shim.
SHIMMED = ("fsdp1", "fsdp2", "fsdp2-whole", "zero1", "zero2", "zero3")


def mode_settings(mode: str, world: int) -> dict[str, Any]:
    if world == 1:
        return {"use_cpu": True}
    if mode.startswith("fsdp"):
        config = {
            "version": int(mode[4]),
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": mode == "fsdp2" if mode[4] == "2" else "FULL_SHARD",
            "cpu_ram_efficient_loading": False,
            "use_orig_params": True,
            "sync_module_states": False,
        }
        return {"use_cpu": False, "fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if mode.startswith("zero"):
        return {"use_cpu": False, "deepspeed": zero_config(int(mode[4]))}
    return {"use_cpu": True}


def zero_config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
    }


def prepare(mode: str, world: int) -> None:
    if mode.startswith("zero") and world > 1:
        import deepspeed

        # Compiling this takes minutes, and gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")


def build_model(mode: str, world: int, base: str, dtype: torch.dtype, full: bool = False) -> LlamaForCausalLM:
    if mode == "native" and world > 1:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(fsdp_size=world)
        return LlamaForCausalLM.from_pretrained(base, dtype=dtype, distributed_config=config)
    if full or (mode == "zero3" and world > 1):
        return LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    return llama().to(dtype)
