"""The settings of a mashup."""

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from .methods import check_merge


MetricName = Literal["loss", "token_accuracy"]
Space = Literal["delta", "core", "factors"]
Search = Literal["racing", "exhaustive"]
OnError = Literal["scratch", "raise"]
_CHOICES: Mapping[str, Any] = {"metric": MetricName, "merge_space": Space, "search": Search, "on_error": OnError}
# The kind of each number and its smallest value; a default is right as it is.
_SMALLEST: Mapping[str, tuple[type, int]] = {
    "sample_size": (int, 2),
    "guard_margin": (float, 0),
    "batch_size": (int, 1),
    "max_candidates": (int, 1),
    "max_download_gb": (float, 0),
    "max_seconds": (float, 0),
    "seed": (int, 0),
    "min_kept_energy": (float, 0),
}


@dataclass(frozen=True)
class MashupConfig:
    r"""
    Settings of [`MashupCallback`]. For YAML and the command line see [`MashupArguments`].

    Args:
        top_k (`int` or `"auto"`, *optional*, defaults to `3`):
            Number of candidates to merge, k in the paper. `"auto"` adds the next best candidate for as long as the
            held-out loss falls.
        sample_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows of the training data used: half select, the other half is held out for the guard. `"auto"` takes as
            many, from 32 to 512, as keep scoring and guarding within 5% of the run's own forward and backward work;
            in short runs as few as 16 of long rows, if each half has 1,024 label tokens. Where the guard finds the
            best start neither better nor worse by `guard_margin`, it goes on with twice as many held-out rows, and
            again: within the 5%, or up to 64 rows at up to 20%.
        metric (`str` or `Callable`, *optional*, defaults to `"loss"`):
            What ranks the candidates: `"loss"` (negative log-likelihood per label token), `"token_accuracy"`, or a
            callable `metric(model, batch)` that returns a loss and a count for the batch (lower is better); see
            [`score_candidates`].
        merge_method (`str`, *optional*, defaults to `"linear"`):
            Any method registered in mergekit, or `"auto"`, which tries several and keeps the one with the lowest
            held-out loss.
        merge_parameters (`Mapping[str, Any]`, *optional*, defaults to `{}`):
            Parameters of the merge method, passed to mergekit (`density`, `lambda`, ...).
        merge_space (`str`, *optional*, defaults to `"delta"`):
            `"delta"` merges the weight updates exactly as merging full models would, `"core"` merges them in their
            shared low-rank basis, `"factors"` merges A and B apart, as the paper's code does.
        weights (`str` or `Sequence[float]`, *optional*, defaults to `"equal"`):
            `"equal"`, `"softmax"` (of minus the loss) or one number for each of the `top_k` candidates, best first.
        search (`str`, *optional*, defaults to `"racing"`):
            `"racing"` (successive halving on growing samples) or `"exhaustive"` (every candidate sees every row).
        guard (`bool`, *optional*, defaults to `True`):
            Never start from something whose held-out loss is worse than that of a fresh initialization.
        guard_margin (`float`, *optional*, defaults to `2.0`):
            By how many standard errors, of the paired differences over the held-out rows, a start must be better than
            a fresh initialization; 0 accepts any improvement.
        batch_size (`int`, *optional*):
            Most rows in a forward pass. `None` takes the Trainer's, and as many more as fit into 1,024 tokens on a CPU
            or 8,192 elsewhere; halved whenever memory runs out.
        max_candidates (`int`, *optional*, defaults to `64`):
            Candidates looked at; the rest is reported as rejected.
        max_download_gb (`float`, *optional*, defaults to `10.0`):
            Bound on what is downloaded from the Hub, in 10⁹ bytes.
        max_seconds (`float`, *optional*):
            Bound on the time spent on scoring; the best so far is used when it is hit.
        allow_licenses (`list[str]`, *optional*):
            Licenses a Hub candidate may have. `None` allows every license.
        allow_authors (`list[str]`, *optional*):
            Users and organizations a Hub candidate may come from. `None` allows everyone.
        seed (`int`, *optional*):
            Seed of the sample and of merge methods that draw random numbers. `None` takes the Trainer's.
        base_model (`str`, *optional*):
            Hub name of the base model, where the model's own configuration does not say it.
        dry_run (`bool`, *optional*, defaults to `False`):
            Rank, merge and report, but leave the model alone.
        overwrite (`bool`, *optional*, defaults to `False`):
            Accept a trainee that is already trained, and overwrite it, its `modules_to_save` too.
        min_kept_energy (`float`, *optional*, defaults to `0.5`):
            For a full checkpoint as a candidate of a LoRA trainee: share of its update's squared Frobenius norm that
            the trainee's rank must keep, 0 to 1. Below it most of what the checkpoint learned is lost, and it is
            rejected; 0 accepts everything.
        guard_dataset (`Dataset` or sequence of rows, *optional*):
            Rows for the guard, in the form the Trainer's own training rows have, for when candidates may have been
            trained on the training rows.
        report_dir (`str`, *optional*):
            Where the report and the merge are written. `None` means `<output_dir>/mashup`. An earlier mashup there is
            replaced, nothing else; a run that fails keeps an earlier merge and writes `failed.json` beside it.
        on_error (`str`, *optional*, defaults to `"scratch"`):
            What happens when no usable candidate is left or a stage fails: `"scratch"` warns and trains from the fresh
            initialization, `"raise"` raises.

    Raises:
        ValueError: A setting has a value out of range, the merge method is unknown, or one of its parameters is
            missing or unknown.
        TypeError: A setting has a value of the wrong type.
    """

    top_k: int | Literal["auto"] = 3
    sample_size: int | Literal["auto"] = "auto"
    metric: MetricName | Callable[..., Any] = "loss"
    merge_method: str = "linear"
    merge_parameters: Mapping[str, Any] = field(default_factory=dict)
    merge_space: Space = "delta"
    weights: Literal["equal", "softmax"] | Sequence[float] = "equal"
    search: Search = "racing"
    guard: bool = True
    guard_margin: float = 2.0
    batch_size: int | None = None
    max_candidates: int = 64
    max_download_gb: float = 10.0
    max_seconds: float | None = None
    allow_licenses: list[str] | None = None
    allow_authors: list[str] | None = None
    seed: int | None = None
    base_model: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    min_kept_energy: float = 0.5
    guard_dataset: Any = None
    report_dir: str | None = None
    on_error: OnError = "scratch"

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not (
            self.top_k == "auto" or (isinstance(self.top_k, int) and self.top_k > 0)
        ):
            raise ValueError(f'`top_k` is {self.top_k!r}, expected a whole number of at least 1, or "auto".')
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _CHOICES and not (item.name == "metric" and callable(value)):
                _check_choice(item.name, value)
            elif item.name in _SMALLEST and (isinstance(value, int | float) or value != item.default):
                _check_number(item.name, value)
            elif isinstance(item.default, bool) and not isinstance(value, bool):
                raise TypeError(f"`{item.name}` is {value!r}, expected True or False.")
        if self.min_kept_energy > 1:
            raise ValueError(f"`min_kept_energy` is {self.min_kept_energy!r}, expected a share of at most 1.")
        for name in ("allow_licenses", "allow_authors"):
            value = getattr(self, name)
            if isinstance(value, str) or not (value is None or all(isinstance(item, str) for item in value)):
                raise TypeError(f"`{name}` is {value!r}, expected a list of strings or None.")
        rows = self.guard_dataset
        if isinstance(rows, str | Mapping) or not (rows is None or hasattr(rows, "__len__")):
            raise TypeError(
                f"`guard_dataset` is {str(rows)[:80]!r}, a {type(rows).__name__}, expected rows such as a "
                "`datasets.Dataset` in the form of the Trainer's own training rows."
            )
        if not isinstance(self.merge_parameters, Mapping):
            raise TypeError(
                f'`merge_parameters` is {self.merge_parameters!r}, expected a mapping such as {{"density": 0.5}}.'
            )
        if self.report_dir is not None:
            object.__setattr__(self, "report_dir", os.fspath(self.report_dir))
        object.__setattr__(self, "merge_parameters", dict(self.merge_parameters))
        object.__setattr__(self, "weights", _weights(self.weights))
        top_k = None if self.top_k == "auto" else self.top_k
        check_merge(self.merge_method, self.merge_parameters, self.weights, self.merge_space, top_k)

    def resolved(self, seed: int) -> "MashupConfig":
        """Returns the settings with the Trainer's seed where they have none."""
        return self if self.seed is not None else replace(self, seed=seed)

    @classmethod
    def from_settings(cls, config: "MashupConfig | None", settings: Mapping[str, Any]) -> "MashupConfig":
        """Returns `config`, or the defaults, with the `settings` given by keyword on top; unknown ones raise."""
        if config is not None and not isinstance(config, MashupConfig):
            raise TypeError(f"`config` is a {type(config).__name__}, expected a MashupConfig.")
        names = [item.name for item in fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else f"The settings are {', '.join(names)}."
                raise TypeError(f"MashupCallback got an unknown setting `{name}`. {hint}")
        return cls(**settings) if config is None else replace(config, **settings)

    @classmethod
    def from_texts(cls, values: Mapping[str, Any]) -> "MashupConfig":
        """Returns the settings that a command line has given, where a number, JSON and a list of numbers are text."""
        parsed = dict(values)
        weights, parameters = (parsed.get(name) for name in ("weights", "merge_parameters"))
        for name in ("top_k", "sample_size"):
            if isinstance(text := parsed.get(name), str):
                parsed[name] = int(text) if text.strip().isdecimal() else text.strip()
        if isinstance(weights, str) and not weights.strip("[]() ").isidentifier():
            parsed["weights"] = [part for part in weights.strip("[]() ").split(",") if part.strip()]
        if isinstance(parameters, str):
            try:
                parsed["merge_parameters"] = json.loads(parameters)
            except json.JSONDecodeError as error:
                raise ValueError(f"`merge_parameters` is not valid JSON ({error}): {parameters!r}") from error
        return cls(**parsed)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON can hold them: callables by their name, rows by their number."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if callable(self.metric):
            values["metric"] = getattr(self.metric, "__qualname__", type(self.metric).__name__)
        if self.guard_dataset is not None:
            values["guard_dataset"] = f"{len(self.guard_dataset)} rows"
        for name in ("weights", "allow_licenses", "allow_authors"):
            if values[name] is not None and not isinstance(values[name], str):
                values[name] = list(values[name])
        return values


def _weights(value: Any) -> Any:
    if value in ("equal", "softmax"):
        return value
    try:
        numbers = () if isinstance(value, str) else tuple(float(number) for number in value)
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f'`weights` is {value!r}, expected "equal", "softmax" or finite numbers such as [2, 1, 1].')
    return numbers


def _check_choice(name: str, value: Any) -> None:
    choices = get_args(_CHOICES[name])
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        expected = ", ".join(map(repr, choices)) + (" or a callable" if name == "metric" else "")
        raise ValueError(f"`{name}` is {value!r}, expected one of {expected}.{hint}")


def _check_number(name: str, value: Any) -> None:
    kind, minimum = _SMALLEST[name]
    numeric = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not numeric:
        raise TypeError(f"`{name}` is {value!r}, expected {'a whole number' if kind is int else 'a number'}.")
    if not minimum <= value < math.inf:
        raise ValueError(f"`{name}` is {value!r}, expected a finite number of at least {minimum}.")
