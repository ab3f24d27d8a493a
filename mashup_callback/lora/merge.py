"""Merge LoRA adapters with mergekit's methods and give the result as factors of the wanted rank."""

import dataclasses
import functools
import importlib.metadata
import logging
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..candidates import Candidate, as_candidate, read_source
from ..formats import Adapter, load_factors
from ..lowrank import Factors, LoraFactors, trainable
from ..methods import SPACES, MergeRule, check_merge
from ..report import MergeInfo
from ..storage import refuse_foreign, refuse_overlap
from .spaces import ModuleMerge
from .writer import save_adapter


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """
    A merge of LoRA adapters.

    Args:
        factors (`Factors`):
            Merged update per module, float32, scaling 1.0. A module's rank is at most the wanted one and at most the
            numerical rank of the merge (0 for a zero update): ranks beyond it are the trainee's to fill.
        kept_energy (`Mapping[str, float]`):
            Share of the squared Frobenius norm of the untruncated merge that the factors keep, per module.
        method (`str`): mergekit's method.
        space (`str`): `"delta"`, `"core"` or `"factors"`.
        parameters (`Mapping[str, Any]`): Parameters given to mergekit, without the weights.
        weights (`tuple[float, ...]`): One weight per adapter.
        rank (`int`): Largest rank of a module.
        mergekit_version (`str`): Version of mergekit that merged.
        path (`Path`, *optional*): Directory the adapter was saved in.
    """

    factors: Factors
    kept_energy: Mapping[str, float]
    method: str
    space: str
    parameters: Mapping[str, Any]
    weights: tuple[float, ...]
    rank: int
    mergekit_version: str = field(default_factory=functools.partial(importlib.metadata.version, "mergekit"))
    path: Path | None = None

    @property
    def total_kept_energy(self) -> float:
        """Share of the squared Frobenius norm kept over all modules together; 1.0 for a merge that is zero."""
        kept = {name: factors.norm() ** 2 for name, factors in self.factors.items()}
        total = sum(energy / self.kept_energy[name] for name, energy in kept.items() if energy > 0)
        return sum(kept.values()) / total if total > 0 else 1.0

    def info(self, layers: Collection[str] | None = None) -> MergeInfo:
        """Returns what a report says about the merge where only these layers, by default all, are trained."""
        held = {name: update for name, update in self.factors.items() if layers is None or name in layers}
        kept = {name: self.kept_energy[name] for name in held}
        energies = {name: update.norm() ** 2 for name, update in self.factors.items()}
        lost, total = tuple(name for name in self.factors if name not in held), sum(energies.values())
        return MergeInfo(
            method=self.method,
            space=self.space,
            parameters=dict(self.parameters),
            rank=_largest_rank(held),
            kept_energy=dataclasses.replace(self, factors=held, kept_energy=kept).total_kept_energy,
            kept_energy_by_module=kept,
            lost_energy=sum(energies[name] for name in lost) / total if total else 0.0,
            lost_layers=lost,
            mergekit_version=self.mergekit_version,
        )


def merge_factors(
    inputs: Sequence[Factors],
    *,
    weights: Sequence[float],
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    space: str = "delta",
    ranks: int | Mapping[str, int] | None = None,
    seed: int = 42,
    device: torch.device | str | None = None,
) -> MergedAdapter:
    """
    Merges the updates of several adapters of one base model.

    In `"delta"` space the merge is the best rank-r approximation of mergekit's merge of the dense updates; methods
    that commute with a change of basis run on small cores instead, to the same effect. `"core"` runs every method on
    the cores (as KnOTS, arXiv 2410.19735, and Core Space, arXiv 2509.17786). `"factors"` merges A and B apart, as the
    code of Mashup Learning (arXiv 2603.10156) does, each times the square root of the adapter's scaling.

    An adapter that lacks a module, or whose update of it is zero, contributes a zero matrix there and its weight
    still counts, as when full models are merged; in `"factors"` space a zero B and the mean A of the others. Where
    mergekit copies a tensor that one model alone has (`slerp`, `nuslerp`, `arcee_fusion`), a lone update is copied.

    A single adapter is returned unmerged if the method needs more. `ranks` are the largest of the result, for all
    modules or per module; modules without one keep the largest rank of their inputs. One module at a time is merged on
    `device`, by default where it is; the result is on the CPU.
    """
    weights = tuple(float(weight) for weight in weights)
    _check_inputs(inputs, weights, space)
    merge = ModuleMerge(MergeRule.create(method, parameters), weights, space, seed)
    if len(inputs) > 1:
        check_merge(method, parameters, weights if merge.rule.takes_weights else "equal", space, len(inputs))
    factors, kept = {}, {}
    for name in dict.fromkeys(name for adapter in inputs for name in adapter):
        updates = [adapter.get(name) for adapter in inputs]
        moved = [update if update is None or device is None else update.to(device) for update in updates]
        merged = merge(name, moved, _wanted_rank(ranks, name))
        factors[name], kept[name] = merged.factors.to("cpu"), merged.kept_energy
    return MergedAdapter(
        factors, kept, method, space, dict(merge.rule.parameters), weights, rank=_largest_rank(factors)
    )


def merge_adapters(
    adapters: Sequence[str | Path | Candidate],
    *,
    weights: str | Sequence[float] = "equal",
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    space: str = "delta",
    rank: int | None = None,
    output_dir: str | Path | None = None,
    seed: int = 42,
) -> MergedAdapter:
    """
    Merges adapters from disk, without their base model.

    Args:
        adapters (sequence of `str`, `Path` or `Candidate`):
            Directories with `adapter_config.json` and `adapter_model.safetensors`, or candidates that are on disk.
        weights (`str` or sequence of `float`, *optional*, defaults to `"equal"`):
            `"equal"` or one number per adapter.
        method (`str`, *optional*, defaults to `"linear"`):
            A method registered in mergekit.
        parameters (`Mapping[str, Any]`, *optional*):
            mergekit's parameters; `slerp`'s `t` defaults to 0.5.
        space (`str`, *optional*, defaults to `"delta"`):
            `"delta"`, `"core"` or `"factors"`, see [`merge_factors`].
        rank (`int`, *optional*):
            Rank of the result; None takes the largest rank of the adapters, per module.
        output_dir (`str` or `Path`, *optional*):
            Where to save the merge as a peft adapter of one rank, with A as large as a fresh one; an earlier merge
            there is replaced, nothing else. Ranks that it does not fill get a fresh A and a zero B.
        seed (`int`, *optional*, defaults to 42):
            Seed of methods that draw random numbers, and of the fresh A.

    Returns:
        `MergedAdapter`: The merge, with `path` set if it was saved.

    Raises:
        ValueError: If the settings do not fit together, an adapter cannot be used, or `output_dir` holds other
            files or an input.
    """
    if weights == "softmax":
        raise ValueError('weights="softmax" needs the losses of the adapters. Give numbers or "equal" here.')
    check_merge(method, parameters, weights, space, len(adapters))
    read = _read_fitting(adapters)
    if output_dir is not None:
        for name, adapter in read:
            _naming(name, Adapter.refuse_special, adapter)
        refuse_overlap(output_dir, [adapter.path for _, adapter in read])
        refuse_foreign(output_dir)
    numbers = [1 / len(read)] * len(read) if isinstance(weights, str) else weights
    inputs = [_naming(name, load_factors, adapter) for name, adapter in read]
    merged = merge_factors(
        inputs, weights=numbers, method=method, parameters=parameters, space=space, ranks=rank, seed=seed
    )
    bases = list(dict.fromkeys(adapter.config.base_model for _, adapter in read))
    if len(bases) > 1:
        logger.warning("The merged adapters name different base models: %s. Only their shapes were compared.", bases)
    if output_dir is None:
        return merged
    revisions = {adapter.config.revision for _, adapter in read}
    saved = save_adapter(
        Path(output_dir),
        _trainable(merged.factors, rank or max(merged.rank, 1), seed),
        base_model=bases[0],
        revision=revisions.pop() if len(revisions) == 1 else None,
    )
    return dataclasses.replace(merged, path=saved)


def _largest_rank(factors: Factors) -> int:
    return max((update.rank for update in factors.values() if not update.whole), default=0)


def _read_fitting(adapters: Sequence[str | Path | Candidate]) -> list[tuple[str, Adapter]]:
    """Reads adapters and raises `ValueError`, with the name, for one that cannot be read or does not fit the first."""
    candidates = [as_candidate(adapter) for adapter in adapters]
    read = [(candidate.name, _naming(candidate.name, read_source, candidate)) for candidate in candidates]
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, adapter in read:
        for module, shape in adapter.modules.items():
            found = (shape.in_features, shape.out_features)
            first, expected = sizes.setdefault(module, (name, found))
            if expected != found:
                raise ValueError(
                    f"{name} does not fit {first}: its {module} maps {found[0]} features to {found[1]}, expected "
                    f"{expected[0]} to {expected[1]}. Merge adapters of one base model."
                )
    return read


def _naming(name: str, function: Callable[[Any], Any], adapter: Any) -> Any:
    try:
        return function(adapter)
    except ValueError as error:
        raise type(error)(f"{name} cannot be merged: {error}") from error


def _wanted_rank(ranks: int | Mapping[str, int] | None, name: str) -> int | None:
    rank = ranks.get(name) if isinstance(ranks, Mapping) else ranks
    if rank is not None and rank < 1:
        raise ValueError(f"The rank of the merge must be at least 1, found {rank} for {name!r}.")
    return rank


def _check_inputs(inputs: Sequence[Factors], weights: Sequence[float], space: str) -> None:
    if not inputs:
        raise ValueError("Nothing to merge: expected at least one adapter.")
    if len(weights) != len(inputs):
        raise ValueError(f"Found {len(weights)} weights for {len(inputs)} adapters. Give one weight per adapter.")
    if space not in SPACES:
        raise ValueError(f"Unknown merge_space {space!r}. Valid: {', '.join(SPACES)}.")


def _trainable(factors: Factors, rank: int, seed: int) -> dict[str, LoraFactors]:
    """Writes every module into fresh factors of `rank`, drawn as peft initializes them."""
    fresh = {}
    for name, like in factors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        drawn = torch.rand(rank, like.in_features, generator=generator)
        A = ((2 * drawn - 1) / math.sqrt(like.in_features)).to(like.A)
        fresh[name] = LoraFactors(A, A.new_zeros(like.out_features, rank), 1.0)
    return {name: trainable(update, fresh[name]) for name, update in factors.items()}
