"""Writing a LoRA adapter as peft does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..lowrank import Factors
from ..report import MARK
from .adapter import WEIGHTS_NAME
from .adapter_config import CONFIG_NAME


def write_adapter(
    directory: Path,
    factors: Factors,
    *,
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes factors into a directory, which is made, as a LoRA adapter that `PeftModel.from_pretrained` loads."""
    if not factors:
        raise ValueError("there are no factors to save, expected at least one module")
    claims = {"base_model_name_or_path": base_model, "revision": revision, "task_type": task_type}
    return write_tensors(directory, adapter_config(factors) | claims, _state_dict(factors, dtype))


def write_tensors(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Writes an adapter of any kind, its tensors named as peft names them, into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS_NAME).write_bytes(_serialized(tensors, {"format": "pt", **MARK}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
    return directory


def _serialized(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    content = save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    # safetensors writes metadata in any order, and the same adapters must be the same files.
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return content[:8] + text.ljust(length) + content[8 + length :]


def adapter_config(factors: Factors) -> dict[str, Any]:
    """Returns peft's fields for these updates: one rank and alpha for most modules, patterns of exact names else."""
    ranks = {name: factor.rank for name, factor in factors.items()}
    alphas = {name: _plain(factor.scaling * factor.rank) for name, factor in factors.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(factors),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _plain(alpha: float) -> int | float:
    # scaling * rank is off by one unit in the last place for scalings such as 1/3.
    rounded = round(alpha)
    return rounded if rounded and abs(alpha - rounded) <= 1e-12 * abs(alpha) else alpha


def _state_dict(factors: Factors, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, factor in factors.items():
        for letter, tensor in (("A", factor.A), ("B", factor.B)):
            # safetensors refuses tensors that share memory, and merged factors may be views.
            stored = tensor.detach().to(device="cpu", dtype=dtype, copy=True)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = stored.contiguous()
    return tensors
