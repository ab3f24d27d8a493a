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
    Saves factors as a plain LoRA adapter that `PeftModel.from_pretrained` loads, and returns its directory.

    It appears under its name only when it is complete; one that this package wrote before is replaced, and anything
    else there, such as a trained adapter, is a `ValueError`. `dtype` is that of the factors if None.
    """
    with replacing(directory) as draft:
        write_adapter(draft, factors, base_model=base_model, revision=revision, task_type=task_type, dtype=dtype)
    return Path(directory)
