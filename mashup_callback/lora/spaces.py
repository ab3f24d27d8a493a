"""The three spaces a module's updates can be merged in: dense or core updates, cores only, or A and B apart."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from ..lowrank import LoraFactors, Truncation, WholeUpdate, shared_cores, truncate_core, truncate_dense
from ..methods import MergeRule
from ..model import random_state


# Directions of a randomized SVD for each update of full rank, besides the wanted rank.
_DENSE_WIDTH = 64
# One update per adapter, None where it lacks the module.
_Inputs = Sequence[LoraFactors | None]


@dataclass(frozen=True)
class ModuleMerge:
    """The settings of a merge, applied to one module at a time; the seed is mixed with the module's name."""

    rule: MergeRule
    weights: tuple[float, ...]
    space: str
    seed: int

    def __call__(self, name: str, inputs: _Inputs, rank: int | None) -> Truncation:
        """Merges one module and truncates the result to `rank`, by default the largest of the inputs."""
        owned = [f for f in inputs if f is not None]
        _check_shapes(name, owned)
        rank = max(f.rank for f in owned) if rank is None else rank
        present = [f for f in owned if f.norm() > 0]
        try:
            with random_state(zlib.crc32(f"{self.seed}:{name}".encode())):
                return self._merge(inputs, present, rank) if present else _zero_update(owned[0])
        except ValueError as error:
            raise ValueError(f"Cannot merge module {name!r}: {error}") from error

    def _merge(self, inputs: _Inputs, present: Sequence[LoraFactors], rank: int) -> Truncation:
        if present[0].whole:
            return self._merge_whole(inputs, present)
        if self._is_alone(inputs, present):
            return self._truncate(present[0], rank)
        if self.space == "factors":
            return self._merge_apart(inputs, rank)
        # A core of updates of full rank is as large as the layer.
        if self.space == "core" or (self.rule.commutes and not any(f.dense for f in present)):
            return self._merge_cores(inputs, present, rank)
        return self._merge_dense(inputs, present, rank)

    def _truncate(self, update: LoraFactors, rank: int) -> Truncation:
        if update.dense:
            return truncate_dense(update.delta(), rank, _DENSE_WIDTH)
        basis, (core,) = shared_cores([update])
        return truncate_core(basis, core, rank)

    def _merge_cores(self, inputs: _Inputs, present: Sequence[LoraFactors], rank: int) -> Truncation:
        basis, cores = shared_cores(present, principal=not self.rule.commutes)
        core_of = dict(zip(map(id, present), cores, strict=True))
        zero = torch.zeros_like(cores[0])
        merged = self.rule.merge([core_of.get(id(f), zero) for f in inputs], self.weights)
        # Updates that cancel leave rounding errors, which are no update.
        if merged.norm() <= 1e-12 * max(core.norm() for core in cores):
            merged = zero
        return truncate_core(basis, merged, rank)

    def _merge_whole(self, inputs: _Inputs, present: Sequence[LoraFactors]) -> Truncation:
        """Merges as full models are merged, in every space: the trained parameter holds all of it."""
        merged = present[0].delta() if self._is_alone(inputs, present) else self._dense(inputs)
        shape = present[0].out_features, present[0].in_features
        return Truncation(WholeUpdate({"whole": merged}, itemgetter("whole"), shape), 1.0)

    def _merge_dense(self, inputs: _Inputs, present: Sequence[LoraFactors], rank: int) -> Truncation:
        width = sum(_DENSE_WIDTH if f.dense else f.rank for f in present)
        return truncate_dense(self._dense(inputs), rank, width)

    def _is_alone(self, inputs: _Inputs, present: Sequence[LoraFactors]) -> bool:
        return len(present) == 1 and (self.rule.passes_lone_input or len(inputs) < self.rule.input_range[0])

    def _dense(self, inputs: _Inputs) -> torch.Tensor:
        updates = [None if f is None else f.to(torch.float32).delta() for f in inputs]
        zero = torch.zeros_like(next(update for update in updates if update is not None))
        return self.rule.merge([zero if update is None else update for update in updates], self.weights)

    def _merge_apart(self, inputs: _Inputs, rank: int) -> Truncation:
        pairs = [None if f is None else _split_scaling(f) for f in inputs]
        owned = [pair for pair in pairs if pair is not None]
        ranks = sorted({A.shape[0] for A, _ in owned})
        if len(ranks) > 1:
            raise ValueError(
                f'space="factors" merges A and B apart and needs one rank, found {ranks}. Use "delta" or "core".'
            )
        absent = (sum(A for A, _ in owned) / len(owned), torch.zeros_like(owned[0][1]))
        A, B = (self.rule.merge(side, self.weights) for side in zip(*(pair or absent for pair in pairs), strict=True))
        merged = LoraFactors(A, B, 1.0)
        return Truncation(merged, 1.0) if merged.rank <= rank else self._truncate(merged, rank)


def _zero_update(like: LoraFactors) -> Truncation:
    return Truncation(LoraFactors(like.A[:0].float(), like.B[:, :0].float(), 1.0), 1.0)


def _split_scaling(factors: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
    root = math.sqrt(abs(factors.scaling))
    return factors.A.float() * root, factors.B.float() * math.copysign(root, factors.scaling)


def _check_shapes(name: str, inputs: Sequence[LoraFactors]) -> None:
    shapes = sorted({(f.out_features, f.in_features) for f in inputs})
    if len(shapes) > 1:
        raise ValueError(
            f"Module {name!r} has updates of shapes {shapes} in different adapters; expected one (out_features, "
            "in_features). Merge adapters of the same base model only."
        )
