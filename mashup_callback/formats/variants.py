"""The update of one layer as each method of peft stores it: LoRA, DoRA, AdaLoRA, LoHa and LoKr."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import AdapterError
from ..lowrank import DenseUpdate, LoraFactors, WholeUpdate


Parts = Mapping[str, torch.Tensor]
# A composed update is kept as factors up to this share of the layer's size, and computed each time beyond it.
_MAX_SHARE = 0.5
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# How the names of a layer's tensors end, by `peft_type`, and which part of the update each is.
ENDS: Mapping[str, Mapping[str, str]] = {
    "LORA": {
        **{f"lora_{part}{name}.weight": part for part in "AB" for name in ("", ".default")},
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
    },
    "ADALORA": {"lora_A": "A", "lora_B": "B", "lora_E": "E"},
    "LOHA": {end: end for end in _LOHA},
    "LOKR": {end: end for end in _LOKR},
}


@dataclass(frozen=True)
class Form:
    """
    A form of the update: the parts that it needs, and its factors, with scaling 1.0, by these parts.

    `dense` gives the whole update where that is cheaper than by its factors, `of_weight` where it depends on the base
    model's weight, for the reason `why`; `whole` is one of a parameter that was trained besides the adapter.
    """

    parts: frozenset[str]
    factors: Callable[[Parts], LoraFactors]
    dense: Callable[[Parts], torch.Tensor] | None = None
    of_weight: Callable[[Parts, float, torch.Tensor], torch.Tensor] | None = None
    why: str = ""
    whole: bool = False

    def update(self, parts: Parts, scaling: float, weight: Callable[[], torch.Tensor] | None = None) -> LoraFactors:
        """Returns the update; `weight` gives the base model's weight, on which some depend."""
        # Outlined first: factors of products may be very many more numbers than the parts.
        outline = self.factors({name: part.to("meta") for name, part in parts.items()})
        shape, kind = (outline.out_features, outline.in_features), WholeUpdate if self.whole else DenseUpdate
        if of_weight := self.of_weight:
            if weight is None:
                raise AdapterError(f"{self.why}, and there is no base model here to read")
            return kind(parts, lambda own: of_weight(own, scaling, weight()), shape)
        if (dense := self.dense) and outline.rank * sum(shape) > _MAX_SHARE * shape[0] * shape[1]:
            return kind(parts, lambda own: scaling * dense(own), shape)
        factors = self.factors(parts)
        return LoraFactors(factors.A, factors.B, scaling)


def find_form(peft_type: str, use_dora: bool, parts: Iterable[str]) -> Form:
    """Returns the form that consists of these parts; raises `AdapterError` where there is none."""
    found, forms = frozenset(parts), (*_BESIDES, *_FORMS["DORA" if use_dora else peft_type])
    for form in forms:
        if form.parts == found:
            return form
    missing = next((sorted(form.parts - found) for form in forms if form.parts > found), [])
    ends = [next(end for end, part in ENDS[peft_type].items() if part == name) for name in missing]
    if not ends:
        what = "DoRA, and `use_dora` is not set" if "magnitude" in found else "more than one update"
        raise AdapterError(f"{', '.join(sorted(found))} are parts of {what}")
    raise AdapterError(f"{' and '.join(ends)} is missing")


def _pair(A: torch.Tensor, B: torch.Tensor) -> LoraFactors:
    if A.ndim != 2 or B.ndim != 2 or not A.numel() or not B.numel():
        shapes = " and ".join(str(tuple(part.shape)) for part in (A, B))
        raise AdapterError(f"found shapes {shapes}, expected a matrix: only linear layers are supported")
    if A.shape[0] != B.shape[1]:
        raise AdapterError(f"the ranks differ, {A.shape[0]} rows of one factor and {B.shape[1]} columns of the other")
    return LoraFactors(A, B, 1.0)


def _lora(parts: Parts) -> LoraFactors:
    return _pair(parts["A"], parts["B"])


def _dora(parts: Parts) -> LoraFactors:
    factors = _lora(parts)
    if parts["magnitude"].shape != (factors.out_features,):
        raise AdapterError(f"the magnitude has shape {tuple(parts['magnitude'].shape)}, expected one for each output")
    return factors


def _rescaled(parts: Parts, scaling: float, weight: torch.Tensor) -> torch.Tensor:
    # On the model's device, where the weight is.
    A, B, magnitude = (parts[name].to(weight.device) for name in ("A", "B", "magnitude"))
    weight = weight.to(A.dtype)
    tuned = weight + scaling * (B @ A)
    update = (magnitude / torch.linalg.vector_norm(tuned, dim=1))[:, None] * tuned - weight
    return update.to(parts["A"].device)


def _adalora(parts: Parts) -> LoraFactors:
    if parts["E"].shape != (parts["A"].shape[0], 1):
        raise AdapterError(f"lora_E has shape {tuple(parts['E'].shape)}, expected one for each row of lora_A")
    return _pair(parts["A"] * parts["E"], parts["B"])


def _loha_sides(parts: Parts) -> tuple[LoraFactors, LoraFactors]:
    first, second = (_pair(parts[f"hada_w{index}_b"], parts[f"hada_w{index}_a"]) for index in (1, 2))
    if (first.out_features, first.in_features) != (second.out_features, second.in_features):
        raise AdapterError("the two products have different shapes")
    return first, second


def _loha(parts: Parts) -> LoraFactors:
    """The product of two updates entry by entry, whose factors are products of their rows and of their columns."""
    first, second = _loha_sides(parts)
    A = (first.A[:, None] * second.A[None]).flatten(0, 1)
    B = (first.B[:, :, None] * second.B[:, None]).flatten(1, 2)
    return LoraFactors(A, B, 1.0)


def _loha_dense(parts: Parts) -> torch.Tensor:
    first, second = _loha_sides(parts)
    return first.delta() * second.delta()


def _lokr(parts: Parts) -> LoraFactors:
    """The Kronecker product of two updates, whose factors are the Kronecker products of theirs."""
    first, second = (_lokr_side(parts, f"lokr_w{index}") for index in (1, 2))
    return LoraFactors(torch.kron(first.A, second.A), torch.kron(first.B, second.B), 1.0)


def _lokr_dense(parts: Parts) -> torch.Tensor:
    first, second = (_lokr_side(parts, f"lokr_w{index}").delta() for index in (1, 2))
    return torch.kron(first, second)


def _lokr_side(parts: Parts, name: str) -> LoraFactors:
    if name not in parts:
        return _pair(parts[f"{name}_b"], parts[f"{name}_a"])
    whole = parts[name]
    identity = torch.eye(min(whole.shape, default=0), device=whole.device, dtype=whole.dtype)
    return _pair(identity, whole) if whole.ndim == 2 and len(whole) > whole.shape[1] else _pair(whole, identity)


def _lokr_parts() -> list[frozenset[str]]:
    sides = [[{f"lokr_w{index}"}, {f"lokr_w{index}_a", f"lokr_w{index}_b"}] for index in (1, 2)]
    return [frozenset(first | second) for first in sides[0] for second in sides[1]]


def _whole(parts: Parts) -> LoraFactors:
    """The one part, a vector as one column."""
    [value] = parts.values()
    if value.ndim not in (1, 2) or not value.numel():
        raise AdapterError(f"found shape {tuple(value.shape)}, expected a matrix or a vector")
    shape = len(value), value.numel() // len(value)
    return WholeUpdate(parts, lambda own: next(iter(own.values())).reshape(shape), shape)


def _difference(parts: Parts, scaling: float, weight: torch.Tensor) -> torch.Tensor:
    return _whole(parts).delta() - weight.to(parts["whole"])


_BESIDES = (
    Form(frozenset({"whole"}), _whole, None, _difference, "other parameters were trained besides the adapter", True),
    Form(frozenset({"lora_B.bias"}), _whole, lambda parts: _whole(parts).delta(), whole=True),
)
_FORMS: Mapping[str, tuple[Form, ...]] = {
    "LORA": (Form(frozenset("AB"), _lora),),
    "DORA": (
        Form(frozenset({"A", "B", "magnitude"}), _dora, None, _rescaled, "DoRA rescales the base model's weights"),
    ),
    "ADALORA": (Form(frozenset("ABE"), _adalora),),
    "LOHA": (Form(frozenset(_LOHA), _loha, _loha_dense),),
    "LOKR": tuple(Form(parts, _lokr, _lokr_dense) for parts in _lokr_parts()),
}
