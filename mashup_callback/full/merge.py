"""Merge full checkpoints with mergekit, out of core: from disk to disk, a tensor at a time."""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from ..methods import MergeRule, mergekit_config


SPACE = "weights"
MAX_SHARD_BYTES = 2_000_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInput:
    """
    One input of a merge of full models.

    Args:
        path (`Path`): Directory of a full checkpoint.
        lora (`Path`, *optional*): Directory of an adapter that is merged into it first.
    """

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
    Merge full models of one architecture with mergekit.

    Tensors are read one at a time, merged in float32 and written in shards of 2 GB, so that no model is ever in memory
    as a whole, except where an adapter is merged into its base first: mergekit then loads the base. These merged
    bases go to a cache of this merge alone, which is removed afterwards; mergekit would take a half-written one of an
    interrupted merge for a whole one.

    Args:
        inputs (sequence of `ModelInput`):
            What to merge.
        output_dir (`Path`):
            Directory to write; must not exist. If the merge fails, it does not exist afterwards either.
        weights (sequence of `float`):
            One for each input, mergekit's `weight`; methods that have none ignore them.
        method (`str`, *optional*, defaults to `"linear"`):
            A method registered in mergekit.
        parameters (`Mapping[str, Any]`, *optional*):
            mergekit's parameters; one value for all inputs or a sequence with one for each.
        base (`Path`, *optional*):
            Directory of the base model, for methods that need one.
        out_dtype (`str`, *optional*):
            Data type of the merge; mergekit's choice by default.
        seed (`int`, *optional*, defaults to 42):
            Seed of methods that draw random numbers. The global generators are seeded with it: wrap the call to keep
            them.

    Returns:
        `str`: mergekit's configuration of the merge, as YAML.

    Raises:
        ValueError: The settings do not fit together.
        OSError: There is not enough space on the disk.
    """
    rule = MergeRule.create(method, parameters)
    rule.check_count(len(inputs))
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists, expected a path that nothing has yet. Choose another path.")
    config = merge_config(rule, inputs, weights, base, out_dtype)
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


def merge_config(
    rule: MergeRule,
    inputs: Sequence[ModelInput],
    weights: Sequence[float],
    base: Path | None = None,
    out_dtype: str | None = None,
) -> dict[str, Any]:
    """
    Returns mergekit's configuration of a merge of full models.

    Args:
        rule (`MergeRule`):
            The method and its parameters.
        inputs, weights, base, out_dtype:
            As in [`merge_models`].

    Raises:
        ValueError: The method needs a base and there is none.
    """
    if rule.needs_base and not rule.interpolates and base is None:
        raise ValueError(f"{rule.method} merges updates of a base model, and no `base` is given.")
    options: dict[str, Any] = {"dtype": "float32"}
    if out_dtype:
        options["out_dtype"] = out_dtype
    return mergekit_config(
        rule,
        [model.reference() for model in inputs],
        [float(weight) for weight in weights],
        base and ModelInput(base).reference(),
        **options,
    )


def check_space(directory: Path, needed: int) -> None:
    """
    Raises `OSError` if a directory's disk has less than the needed bytes free.

    Args:
        directory (`Path`):
            An existing directory.
        needed (`int`):
            Bytes.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"Merging full models needs {needed / 1e9:.3g} GB in {directory}, and {free / 1e9:.3g} GB are free. Free "
            "some space, or set `report_dir` to a larger disk."
        )


def _run(config: Mapping[str, Any], output_dir: Path, cache: Path, seed: int) -> None:
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
        with torch.no_grad():
            run_merge(parsed, str(output_dir), options)
    finally:
        _forget(parsed)


def _forget(config: MergeConfiguration) -> None:
    """Drops what mergekit keeps of its inputs by their names for the life of the process: files may change."""
    for model in config.referenced_models():
        with suppress(KeyError):
            del LoaderCache.loaders[model]
