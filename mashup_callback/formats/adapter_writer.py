"""Writing a LoRA adapter as peft does, so that it is either there completely or not at all."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..factors import LoraFactors
from ..report import MARK
from ..storage import replacing


def save_adapter(
    directory: str | os.PathLike,
    factors: Mapping[str, LoraFactors],
    *,
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Writes factors as a plain LoRA adapter that `PeftModel.from_pretrained` loads.

    The directory appears under its name only when it is complete; one that this package wrote before is replaced.

    Args:
        directory (`str` or `os.PathLike`):
            Where to write. An existing directory must be empty or written by this package.
        factors (`Mapping[str, LoraFactors]`):
            The updates by module name in the base model.
        base_model (`str`, *optional*):
            Name of the base model to record.
        revision (`str`, *optional*):
            Its revision.
        task_type (`str`, *optional*):
            peft's task type, for example `"CAUSAL_LM"`.
        dtype (`torch.dtype`, *optional*):
            Data type to store; by default the factors' own.

    Returns:
        `Path`: the directory.

    Raises:
        ValueError: If there are no factors, or the directory holds anything else, such as a trained adapter.
    """
    if not factors:
        raise ValueError("there are no factors to save, expected at least one module")
    config = adapter_config(factors) | {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "task_type": task_type,
    }
    with replacing(directory) as draft:
        _write(draft, config, _state_dict(factors, dtype))
    return Path(directory)


def adapter_config(factors: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """
    Returns the fields of `adapter_config.json` that make peft compute these updates: one rank and alpha for most
    modules, and exact names in `rank_pattern` and `alpha_pattern` for the others.
    """
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


def _state_dict(factors: Mapping[str, LoraFactors], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, factor in factors.items():
        for letter, tensor in (("A", factor.A), ("B", factor.B)):
            # safetensors refuses tensors that share memory, and merged factors may be views.
            stored = tensor.detach().to(device="cpu", dtype=dtype, copy=True)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = stored.contiguous()
    return tensors


def _write(directory: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt", **MARK})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "adapter_config.json").write_text(text, encoding="utf-8")
