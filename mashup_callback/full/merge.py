"""Merge full checkpoints with mergekit, out of core: from disk to disk, a tensor at a time."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..methods import MergeRule, mergekit_config
from ..model import random_state


if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration


MAX_SHARD_BYTES = 2_000_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInput:
    """One input of a merge of full models: a full checkpoint, and an adapter that is merged into it first."""

    path: Path
    lora: Path | None = None

    def reference(self) -> dict[str, Any]:
        """Returns the input in mergekit's terms; a relative path would be looked up on the Hub."""
        model = {"model": {"path": str(self.path.resolve())}}
        return model if self.lora is None else {**model, "lora": {"path": str(self.lora.resolve())}}


def merge_models(
    inputs: Sequence[ModelInput],
    output_dir: Path,
    *,
    weights: Sequence[float],
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    base: Path | None = None,
    out_dtype: str | None = None,
    seed: int = 42,
) -> str:
    """
    Merges full models of one architecture with mergekit, into a directory that must not exist, nor does if it fails.

    Tensors are read one at a time, merged in float32 and written in shards of 2 GB, but for the bases that adapters
    are merged into first: these are loaded, and kept in a cache of this merge alone, since mergekit would take a
    half-written one of an interrupted merge for a whole one. Returns mergekit's configuration, as YAML.
    """
    rule = MergeRule.create(method, parameters)
    rule.check_count(len(inputs))
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists, expected a path that nothing has yet. Choose another path.")
    config = mergekit_config(
        rule,
        [model.reference() for model in inputs],
        [float(weight) for weight in weights],
        base and ModelInput(base).reference(),
        dtype="float32",
        **({"out_dtype": out_dtype} if out_dtype else {}),
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix=".loras-", dir=output_dir.parent))
    try:
        _run(config, output_dir, cache, seed)
    except BaseException:
        shutil.rmtree(output_dir, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return yaml.safe_dump(config, sort_keys=False)


def check_space(directory: Path, needed: int) -> None:
    """Raises `OSError` if the disk of an existing directory has less than the needed bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"Merging full models needs {needed / 1e9:.3g} GB in {directory}, and {free / 1e9:.3g} GB are free. Free "
            "some space, or set `report_dir` to a larger disk."
        )


def _run(config: Mapping[str, Any], output_dir: Path, cache: Path, seed: int) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parsed = MergeConfiguration.model_validate(config)
    options = MergeOptions(
        copy_tokenizer=False,
        lora_merge_cache=str(cache),
        out_shard_size=MAX_SHARD_BYTES,
        quiet=True,
        random_seed=seed,
        write_model_card=False,
    )
    _forget(parsed)
    try:
        # mergekit seeds the global generators.
        with torch.no_grad(), random_state():
            run_merge(parsed, str(output_dir), options)
    finally:
        _forget(parsed)


def _forget(config: "MergeConfiguration") -> None:
    """Drops what mergekit keeps of its inputs by their names for the life of the process: files may change."""
    from mergekit.io.tasks import LoaderCache

    for model in config.referenced_models():
        LoaderCache.loaders.pop(model, None)
