"""Saving a LoRA adapter, so that it is either there completely or not at all."""

import os
from pathlib import Path

import torch

from ..formats import write_adapter
from ..lowrank import Factors
from ..storage import replacing


def save_adapter(
    directory: str | os.PathLike,
    factors: Factors,
    *,
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Saves factors as a plain LoRA adapter that `PeftModel.from_pretrained` loads.

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
    with replacing(directory) as draft:
        write_adapter(draft, factors, base_model=base_model, revision=revision, task_type=task_type, dtype=dtype)
    return Path(directory)
