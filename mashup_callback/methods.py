"""mergekit's merge methods: their parameters, their inputs, and mergekit's configuration of a merge."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .model import random_state


if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethodSpec

# mergekit is imported where it is used: it takes seconds, and most of the package does without.


SPACES = ("delta", "core", "factors")
MERGEKIT_NAME = "mergekit.yaml"
# Values for parameters that mergekit requires and that have one neutral choice.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"slerp": {"t": 0.5}}
# Methods that commute with an orthonormal change of basis, with the parameters that leave it so.
COMMUTING: Mapping[str, frozenset[str]] = {
    "karcher": frozenset({"max_iter", "tol"}),
    "linear": frozenset({"normalize"}),
    "model_stock": frozenset(),
    "multislerp": frozenset({"normalize_weights"}),
    "nuslerp": frozenset(),
    "passthrough": frozenset({"scale"}),
    "slerp": frozenset({"t"}),
    "task_arithmetic": frozenset({"lambda", "normalize"}),
}


@dataclass(frozen=True)
class MergeRule:
    """A mergekit method with its parameters, checked against the method's contract."""

    method: str
    # Without `weight`; one value for all adapters, or a tuple with one for each.
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def create(cls, method: str, parameters: Mapping[str, Any] | None = None) -> "MergeRule":
        """Checks the names of method and parameters, adds the defaults; raises `ValueError` saying what is wrong."""
        names = merge_methods()
        if method not in names:
            near = _nearest(method, names)
            raise ValueError(f"Unknown merge_method {method!r}{near}. mergekit has {', '.join(names)}.")
        merged = {**_DEFAULTS.get(method, {}), **(parameters or {})}
        _check_parameters(cls(method).spec, merged)
        return cls(method, tuple(sorted((name, _plain(name, value)) for name, value in merged.items())))

    @property
    def spec(self) -> "MergeMethodSpec":
        """mergekit's declaration of the method."""
        from mergekit.merge_methods import get

        return get(self.method).spec

    @property
    def takes_weights(self) -> bool:
        """Whether the method weights its inputs; the others treat all adapters alike."""
        return any(parameter.name == "weight" for parameter in self.spec.parameters)

    @property
    def passes_lone_input(self) -> bool:
        """Whether mergekit copies a tensor that only one model has, where interpolating with zero has no meaning."""
        return bool(self.spec.optional_tensor_policy.name == "PASSTHROUGH_SINGLETON")

    @property
    def commutes(self) -> bool:
        """Whether merging small cores and lifting the result equals merging the dense updates."""
        return self.method in COMMUTING and {name for name, _ in self.parameters} <= COMMUTING[self.method]

    @property
    def normalizes(self) -> bool:
        """Whether only the proportions of the weights matter."""
        given, flags = dict(self.parameters), ("normalize", "normalize_weights")
        values = [given.get(item.name, item.default) for item in self.spec.parameters if item.name in flags]
        return self.takes_weights and (self.method == "nuslerp" or any(values))

    @property
    def input_range(self) -> tuple[int, float]:
        """Smallest and largest number of adapters the method merges."""
        contract, base = self.spec.contract, int(self.needs_base and not self.interpolates)
        lows = [1, contract.min_inputs - base, contract.min_non_base or 0]
        highs = [math.inf if limit is None else limit for limit in (contract.max_inputs, contract.max_non_base)]
        return max(lows), min(highs[0] - base, highs[1])

    def check_count(self, count: int | float) -> None:
        """Raises `ValueError` if the method does not merge `count` adapters."""
        low, high = self.input_range
        if not low <= count <= high:
            span = f"{low} to {high}" if high < math.inf else f"at least {low}"
            expected = f"exactly {low}" if low == high else span
            found = "a number that grows" if count == math.inf else count
            raise ValueError(
                f"{self.method} merges {expected} adapters, found {found}. Set top_k accordingly or choose another "
                "merge_method."
            )

    def merge(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Returns mergekit's merge of one matrix of each adapter; raises `ValueError` if mergekit refuses them."""
        from mergekit.merge_methods import merge_tensors

        parameters = dict(self.parameters) | ({"weight": tuple(weights)} if self.takes_weights else {})
        base_index = 0 if self.needs_base else None
        if self.needs_base and not self.interpolates:
            # The update of the base.
            tensors = [torch.zeros_like(tensors[0]), *tensors]
        try:
            with torch.no_grad():
                merged = merge_tensors(tensors, self.method, parameters=parameters, base_index=base_index)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"mergekit's {self.method} refused {parameters}: {error}") from error
        if not torch.isfinite(merged).all():
            raise ValueError(f"mergekit's {self.method} with {parameters} gave values that are not finite.")
        return merged

    @property
    def needs_base(self) -> bool:
        """Whether mergekit's configuration has to name a base model."""
        return bool(self.spec.contract.base.name == "REQUIRED")

    @property
    def interpolates(self) -> bool:
        """Whether the method goes from one model to another: mergekit calls the first of the two the base."""
        return self.needs_base and self.spec.contract.max_inputs == 2


def mergekit_config(
    rule: MergeRule, models: Sequence[Any], weights: Sequence[float | None], base: Any = None, **options: Any
) -> dict[str, Any]:
    """Returns mergekit's configuration of a merge of models, each in mergekit's terms; `options` are added to it."""
    entries = []
    for index, (model, weight) in enumerate(zip(models, weights, strict=True)):
        own = {name: value[index] for name, value in rule.parameters if isinstance(value, tuple)}
        own |= {"weight": weight} if rule.takes_weights else {}
        entries.append({"model": model} | ({"parameters": own} if own else {}))
    config: dict[str, Any] = {"merge_method": rule.method, "models": entries}
    if rule.needs_base:
        config["base_model"] = models[0] if rule.interpolates else base
    shared = {name: value for name, value in rule.parameters if not isinstance(value, tuple)}
    return config | ({"parameters": shared} if shared else {}) | options


def merge_methods() -> tuple[str, ...]:
    """Names of the merge methods registered in the installed mergekit."""
    from mergekit.merge_methods import registered_methods

    return tuple(method.spec.name for method in registered_methods())


def check_merge(
    method: str,
    parameters: Mapping[str, Any] | None = None,
    weights: str | Sequence[float] = "equal",
    space: str = "delta",
    top_k: int | str | None = None,
) -> None:
    """Checks the settings of a merge before any work is done; raises `ValueError` saying what is wrong."""
    if space not in SPACES:
        raise ValueError(f"Unknown merge_space {space!r}{_nearest(space, SPACES)}. Valid: {', '.join(SPACES)}.")
    numbers = _check_weights(weights, top_k)
    if method == "auto" and parameters:
        raise ValueError(
            f'merge_method="auto" takes no merge_parameters, found {sorted(parameters)}. Name the method they are for.'
        )
    if method == "auto":
        return
    rule = MergeRule.create(method, parameters)
    count = _count(rule, numbers, top_k)
    if weights != "equal" and not rule.takes_weights and len(set(numbers or (0, 1))) > 1:
        raise ValueError(f'{method} has no weights, found weights={weights!r}. Use weights="equal".')
    if numbers is not None and abs(sum(numbers)) < 1e-6 and rule.normalizes:
        raise ValueError(f"{method} divides by the sum of the weights, found {list(numbers)} with sum 0. Change them.")
    # mergekit validates types and values when it merges.
    with random_state(0):
        rule.merge([torch.eye(2) + index for index in range(count)], numbers or [1 / count] * count)


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
    count = int(top_k)
    rule.check_count(count)
    return count


def _check_parameters(spec: "MergeMethodSpec", parameters: Mapping[str, Any]) -> None:
    valid = [parameter.name for parameter in spec.parameters if parameter.name != "weight"]
    if "weight" in parameters:
        raise ValueError("merge_parameters must not hold 'weight': use the setting `weights`.")
    for name, value in parameters.items():
        if name not in valid:
            known = ", ".join(valid) or "none"
            raise ValueError(f"{spec.name} has no parameter {name!r}{_nearest(name, valid)}. It takes: {known}.")
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
