"""What mergekit's merge methods ask for and whether they depend on the basis, read from mergekit instead of listed."""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    MergeMethodSpec,
    OptionalTensorPolicy,
    get,
    merge_tensors,
    registered_methods,
)

from .lowrank import private_rng


SPACES = ("delta", "core", "factors")
MERGEKIT_NAME = "mergekit.yaml"
DEFAULT_PARAMETERS: Mapping[str, Mapping[str, Any]] = {"slerp": {"t": 0.5}}
"""Values for parameters that mergekit requires and that have one neutral choice."""

PROBE_SCALES = (1e-6, 1e-3, 1.0, 1e3)
"""Magnitudes of the probe's entries: methods with absolute thresholds look basis-free at any single one."""


@dataclass(frozen=True)
class MergeRule:
    """
    A mergekit method with its parameters, checked against the method's contract.

    A method that requires a base gets a zero matrix, because the update of the base is zero. Methods of exactly two
    inputs, one of them the base (slerp, nearswap, arcee_fusion), get the first adapter in the base's place.

    Args:
        method (`str`): Name of a method registered in mergekit.
        parameters (`tuple[tuple[str, Any], ...]`): mergekit's parameters except `weight`, sorted by name. One value
            for all adapters, or a tuple with one per adapter.
    """

    method: str
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def create(cls, method: str, parameters: Mapping[str, Any] | None = None) -> "MergeRule":
        """Check the names of method and parameters, add the defaults; raises `ValueError` saying what is wrong."""
        spec = _spec(method)
        merged = {**DEFAULT_PARAMETERS.get(method, {}), **(parameters or {})}
        _check_parameter_names(spec, merged)
        return cls(method, tuple(sorted((name, _plain(name, value)) for name, value in merged.items())))

    @property
    def spec(self) -> MergeMethodSpec:
        """mergekit's declaration of the method."""
        return get(self.method).spec

    @property
    def takes_weights(self) -> bool:
        """Whether the method weights its inputs; the others treat all adapters alike."""
        return any(parameter.name == "weight" for parameter in self.spec.parameters)

    @property
    def passes_lone_input(self) -> bool:
        """Whether mergekit copies a tensor that only one model has, where interpolating with zero has no meaning."""
        return self.spec.optional_tensor_policy == OptionalTensorPolicy.PASSTHROUGH_SINGLETON

    @property
    def needs_base(self) -> bool:
        """Whether the method merges updates of a base model."""
        return self.spec.contract.base == BasePolicy.REQUIRED

    @property
    def input_range(self) -> tuple[int, float]:
        """Smallest and largest number of adapters the method merges."""
        contract, base = self.spec.contract, int(self._needs_zero_base)
        lows = [1, contract.min_inputs - base, contract.min_non_base or 0]
        highs = [math.inf if limit is None else limit for limit in (contract.max_inputs, contract.max_non_base)]
        return max(lows), min(highs[0] - base, highs[1])

    def check_count(self, count: int | float) -> None:
        """Raise `ValueError` if the method does not merge `count` adapters."""
        low, high = self.input_range
        if not low <= count <= high:
            expected = (
                f"exactly {low}" if low == high else f"{low} to {high}" if high < math.inf else f"at least {low}"
            )
            found = "a number that grows" if count == math.inf else count
            raise ValueError(
                f"{self.method} merges {expected} adapters, found {found}. Set top_k accordingly or choose another "
                "merge_method."
            )

    def merge(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """
        Let mergekit merge one matrix of each adapter.

        Args:
            tensors (sequence of `torch.Tensor`): One matrix per adapter, all of one shape and dtype.
            weights (sequence of `float`): One weight per adapter; unused by methods without a `weight`.

        Returns:
            `torch.Tensor`: The merged matrix.

        Raises:
            ValueError: If mergekit refuses the inputs or its result is not finite.
        """
        parameters = dict(self.parameters) | ({"weight": tuple(weights)} if self.takes_weights else {})
        base_index = 0 if self.spec.contract.base == BasePolicy.REQUIRED else None
        if self._needs_zero_base:
            tensors = [torch.zeros_like(tensors[0]), *tensors]
        try:
            with torch.no_grad():
                merged = merge_tensors(tensors, self.method, parameters=parameters, base_index=base_index)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"mergekit's {self.method} refused {parameters}: {error}") from error
        if not torch.isfinite(merged).all():
            raise ValueError(f"mergekit's {self.method} with {parameters} gave values that are not finite.")
        return merged

    def commutes(self, count: int) -> bool:
        """
        Whether merging `count` adapters commutes with an orthonormal change of basis, measured once on random cores.

        Where it does, merging small cores and lifting the result equals merging the dense updates. A method that
        draws random numbers does not: its draws depend on the shape.
        """
        return _commutes(self, count)

    def normalises(self, count: int) -> bool:
        """Whether only the proportions of the weights matter, measured once on random cores."""
        return self.takes_weights and _normalises(self, count)

    @property
    def _needs_zero_base(self) -> bool:
        return self.spec.contract.base == BasePolicy.REQUIRED and self.spec.contract.max_inputs != 2


def merge_methods() -> tuple[str, ...]:
    """Names of the merge methods registered in the installed mergekit."""
    return tuple(method.spec.name for method in registered_methods())


def check_merge(
    method: str,
    parameters: Mapping[str, Any] | None = None,
    weights: str | Sequence[float] = "equal",
    space: str = "delta",
    top_k: int | str | None = None,
) -> None:
    """
    Check the settings of a merge before any work is done.

    Args:
        method (`str`): A method registered in mergekit, or `"auto"`, which the callback resolves later.
        parameters (`Mapping[str, Any]`, *optional*): mergekit's parameters except `weight`; per-adapter ones take a
            number or one value per adapter.
        weights (`str` or sequence of `float`, *optional*, defaults to `"equal"`): `"equal"`, `"softmax"` or numbers.
        space (`str`, *optional*, defaults to `"delta"`): `"delta"`, `"core"` or `"factors"`.
        top_k (`int` or `str`, *optional*): Number of adapters, or `"auto"`; None where it is not known yet.

    Raises:
        ValueError: If a name is unknown, a required parameter is missing, mergekit refuses a value, or the numbers of
            adapters, weights and inputs of the method do not fit together.
    """
    if space not in SPACES:
        raise ValueError(f"Unknown merge_space {space!r}{_nearest(space, SPACES)}. Valid: {', '.join(SPACES)}.")
    numbers = _check_weights(weights, top_k)
    if method == "auto":
        _check_auto(parameters)
        return
    rule = MergeRule.create(method, parameters)
    count = _count(rule, numbers, top_k)
    if weights != "equal" and not rule.takes_weights and len(set(numbers or (0, 1))) > 1:
        raise ValueError(f'{method} has no weights, found weights={weights!r}. Use weights="equal".')
    # The probe inside is also the trial run: mergekit itself validates the parameters' types and values.
    rule.commutes(count)
    if numbers is not None and abs(sum(numbers)) < 1e-6 and rule.normalises(count):
        raise ValueError(f"{method} divides by the sum of the weights, found {list(numbers)} with sum 0. Change them.")


def _check_auto(parameters: Mapping[str, Any] | None) -> None:
    if parameters:
        raise ValueError(
            f'merge_method="auto" takes no merge_parameters, found {sorted(parameters)}. Name the method they are for.'
        )


def _check_weights(weights: str | Sequence[float], top_k: int | str | None) -> tuple[float, ...] | None:
    if isinstance(weights, str):
        if weights not in ("equal", "softmax"):
            raise ValueError(f'Unknown weights {weights!r}. Use "equal", "softmax" or one number per adapter.')
        return None
    numbers = tuple(float(weight) for weight in weights)
    if not all(map(math.isfinite, numbers)) or not any(numbers):
        raise ValueError(f"Weights must be finite and not all zero, found {list(numbers)}.")
    if top_k is not None and len(numbers) != top_k:
        raise ValueError(f"Found {len(numbers)} weights for top_k={top_k}. Give one weight per merged adapter.")
    return numbers


def _count(rule: MergeRule, numbers: Sequence[float] | None, top_k: int | str | None) -> int:
    low, high = rule.input_range
    if top_k == "auto":
        rule.check_count(math.inf if high < math.inf else low)
    if top_k in (None, "auto"):
        top_k = len(numbers) if numbers else int(min(high, max(low, 2)))
    rule.check_count(top_k)
    return int(top_k)


def _spec(method: str) -> MergeMethodSpec:
    if method not in merge_methods():
        names = merge_methods()
        raise ValueError(f"Unknown merge_method {method!r}{_nearest(method, names)}. mergekit has {', '.join(names)}.")
    return get(method).spec


def _check_parameter_names(spec: MergeMethodSpec, parameters: Mapping[str, Any]) -> None:
    valid = [parameter.name for parameter in spec.parameters if parameter.name != "weight"]
    if "weight" in parameters:
        raise ValueError("merge_parameters must not hold 'weight': use the setting `weights`.")
    for name in parameters:
        if name not in valid:
            known = ", ".join(valid) or "none"
            raise ValueError(f"{spec.name} has no parameter {name!r}{_nearest(name, valid)}. It takes: {known}.")
    for name, value in parameters.items():
        accepts, expected = _RANGES.get((spec.name, name)) or _RANGES.get(name) or (lambda number: True, "")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and math.isfinite(number) and not accepts(number):
                raise ValueError(f"merge_parameters[{name!r}] of {spec.name} is {number!r}, expected {expected}.")
    missing = [p.name for p in spec.parameters if p.required and p.name in valid and p.name not in parameters]
    if missing:
        raise ValueError(f"{spec.name} needs {', '.join(missing)}. Set it in merge_parameters.")


# mergekit declares the types of its parameters, and no ranges.
_SHARE = (lambda number: 0 < number <= 1, "a number above 0 and up to 1")
_POSITIVE = (lambda number: number > 0, "a number above 0")
_FRACTION = (lambda number: 0 <= number <= 1, "a number from 0 to 1")
_RANGES: Mapping[Any, tuple[Callable[[float], bool], str]] = {
    "density": _SHARE,
    "select_topk": _SHARE,
    "gamma": _FRACTION,
    "epsilon": _FRACTION,
    "r": _FRACTION,
    ("slerp", "t"): _FRACTION,
    "max_iter": (lambda number: number >= 1, "a whole number of at least 1"),
    "tol": _POSITIVE,
    "eps": _POSITIVE,
}


def _plain(name: str, value: Any) -> Any:
    """Numbers and tuples only: hashable, and independent of how mergekit would name the inputs."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(item is None or isinstance(item, (bool, int, float)) for item in values):
        raise ValueError(f"merge_parameters[{name!r}] is {value!r}; expected a number or one number per adapter.")
    if any(isinstance(item, float) and not math.isfinite(item) for item in values):
        raise ValueError(f"merge_parameters[{name!r}] is {value!r}; expected finite numbers.")
    return values if isinstance(value, (list, tuple)) else value


def _nearest(name: str, valid: Sequence[str]) -> str:
    matches = difflib.get_close_matches(str(name), valid, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _probe(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random cores of shape `(count, 7, 6)` and orthonormal bases that lift them into 24 x 20 matrices."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    left, right = (torch.linalg.qr(randn(rows, columns))[0] for rows, columns in ((24, 7), (20, 6)))
    return randn(count, 7, 6), left, right


def _probe_weights(count: int) -> list[float]:
    return [2 * (index + 1) / (count * (count + 1)) for index in range(count)]


@functools.lru_cache(maxsize=256)
def _commutes(rule: MergeRule, count: int) -> bool:
    cores, left, right = _probe(count)
    weights = _probe_weights(count)
    with private_rng(0, cores.device):
        state = torch.get_rng_state()
        for scale in PROBE_SCALES:
            merged = rule.merge(list(cores * scale), weights)
            dense = rule.merge(list(left @ (cores * scale) @ right.T), weights)
            if (left @ merged @ right.T - dense).norm() > 1e-6 * dense.norm():
                return False
        return torch.equal(state, torch.get_rng_state())


@functools.lru_cache(maxsize=256)
def _normalises(rule: MergeRule, count: int) -> bool:
    cores, weights = _probe(count)[0], _probe_weights(count)
    with private_rng(0, cores.device):
        once = rule.merge(list(cores), weights)
    with private_rng(0, cores.device):
        doubled = rule.merge(list(cores), [2 * weight for weight in weights])
    return torch.allclose(once, doubled)
