"""Scores kept between runs: the same adapter on the same base and the same rows is scored once."""

import hashlib
import json
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..distributed import gather
from ..model import clean_name, is_sharded, local_part, reshard
from .losses import RowLosses


logger = logging.getLogger(__name__)

VERSION = 3
_SUFFIX = ".json"
_FIELDS = ("loss", "correct", "tokens")
# What a configuration says besides the architecture.
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "use_cache")


@dataclass(frozen=True)
class CacheInfo:
    """Where the cache is, how many scores it holds, and their size in bytes."""

    directory: str
    scores: int
    bytes: int


class ScoreCache:
    """
    Losses of candidates row by row, one small JSON file each, in a directory that several runs may share.

    A file is written to a temporary name and moved, so that nobody reads half of it; one that cannot be read counts as
    missing, and a directory that cannot be written is no reason to stop. The directory is `MASHUP_CACHE` by default,
    none where that is empty, then `mashup_callback` in `$XDG_CACHE_HOME` or `~/.cache`.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self.directory = _default_directory() if directory is None else Path(directory)

    def get(self, key: str, rows: int) -> RowLosses | None:
        """Returns the losses of `rows` rows that were kept under a key; None if there are none."""
        if self.directory is None:
            return None
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            losses = RowLosses(*(torch.tensor(found[name], dtype=torch.float64) for name in _FIELDS))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.debug("The cached score %s cannot be read: %s", key, error)
            return None
        sound = all(getattr(losses, name).shape == (rows,) for name in _FIELDS)
        return losses if sound and torch.isfinite(losses.loss).all() else None

    def put(self, key: str, losses: RowLosses) -> None:
        """Keeps losses under a key."""
        if self.directory is None or not torch.isfinite(losses.loss).all():
            return
        path = self._path(key)
        draft = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({name: getattr(losses, name).tolist() for name in _FIELDS}))
            os.replace(draft, path)
        except OSError as error:
            logger.warning("Scores are not kept in %s: %s", self.directory, error)
            self.directory = None
            with suppress(OSError):
                draft.unlink()

    def info(self) -> CacheInfo:
        """Returns how much the cache holds."""
        sizes = [path.stat().st_size for path in self._files() if path.suffix == _SUFFIX]
        return CacheInfo(str(self.directory or ""), len(sizes), sum(sizes))

    def clear(self) -> int:
        """Removes all scores and returns how many there were."""
        scores = self.info().scores
        for path in self._files():
            path.unlink(missing_ok=True)
        return scores

    def _files(self) -> list[Path]:
        # By the form of their names, as the directory may hold other files too.
        names = f"scores/??/{'[0-9a-f]' * 64}.*"
        return [] if self.directory is None else list(self.directory.glob(names))

    def _path(self, key: str) -> Path:
        return self.directory / "scores" / key[:2] / (key + _SUFFIX)


def score_key(candidate: str, base: str, rows: str, metric: str) -> str:
    """Returns the key of a score: hashes of the candidate, the base model and the rows, and the metric's name."""
    return hashlib.sha256(json.dumps([VERSION, candidate, base, rows, metric]).encode()).hexdigest()


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """
    Returns a hash in hex that tells one base model, precision and kind of device from another.

    Every number of every parameter and buffer counts, and the scales of quantized weights; the trainee's adapter does
    not. Of a sharded model every process hashes what it holds, and all must call it. The hash is XXH3, as fast as
    memory: it guards against change, not against forgery.
    """
    if not is_sharded(model):
        return _fingerprint(model)
    # A forward pass leaves parameters gathered, under other names.
    reshard(model)
    return xxhash.xxh3_128("".join(gather(_fingerprint(model))).encode()).hexdigest()


def _fingerprint(model: nn.Module) -> str:
    model = extract_model_from_parallel(model)
    digest = xxhash.xxh3_128(json.dumps(_setting(model), sort_keys=True, default=str).encode())
    foreign = _adapter_tensors(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in foreign:
            digest.update(repr((clean_name(name), str(tensor.dtype), tuple(tensor.shape))).encode())
            for part in (tensor, *_scales(tensor)):
                _hash(digest, part)
    for module in model.modules():
        # bitsandbytes moves the scales of 8-bit weights from the weight to here in the first forward pass.
        if getattr(module, "weight", None) is not None and hasattr(getattr(module, "state", None), "SCB"):
            scales = getattr(module.weight, "SCB", None)
            _hash(digest, module.state.SCB if scales is None else scales)
    return digest.hexdigest()


def _setting(model: nn.Module) -> dict[str, Any]:
    config = model.config.to_dict() if hasattr(model, "config") else {}
    # accelerate wraps the forward pass of a model that it trains in mixed precision.
    mixed = AcceleratorState().mixed_precision if hasattr(model, "_original_forward") else "no"
    return {
        "config": {name: value for name, value in config.items() if name not in _VOLATILE},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "device": next(model.parameters()).device.type,
        "mixed_precision": mixed,
        "versions": [torch.__version__, transformers.__version__],
    }


def _adapter_tensors(model: nn.Module) -> set[int]:
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    base = {id(tensor) for layer in tuned for tensor in _tensors(layer.get_base_layer())}
    return {id(tensor) for layer in tuned for tensor in _tensors(layer)} - base


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _scales(tensor: torch.Tensor) -> list[torch.Tensor | None]:
    """Returns what bitsandbytes keeps beside a 4-bit weight, the scales of its scales too."""
    states = [getattr(tensor, "quant_state", None)]
    states.append(getattr(states[0], "state2", None))
    return [getattr(state, name, None) for state in states for name in ("absmax", "code", "offset")]


def _hash(digest: Any, tensor: torch.Tensor | None) -> None:
    # One tensor at a time is copied from an accelerator, none on a CPU.
    if isinstance(tensor, torch.Tensor) and not tensor.is_meta and (part := local_part(tensor)).numel():
        digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())


def _default_directory() -> Path | None:
    if (chosen := os.environ.get("MASHUP_CACHE")) is not None:
        return Path(os.path.expanduser(chosen)) if chosen else None
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "mashup_callback"
