"""`adapter_config.json` as untrusted data: the fields that decide what a LoRA adapter computes, and nothing else."""

import dataclasses
import math
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError
from .files import parse_object, quote


CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_RANK = 2**15
MAX_ALPHA = 1e5
# Initializations after which the update is scaling·B·A on the original base. peft writes `true` for an adapter of
# another initialization that it converted for the original base on saving.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_LITERAL = frozenset(string.ascii_letters + string.digits + "_-.")
# Fields of which no value changes what the adapter computes, or that are read here: those of every method, of LoRA,
# of AdaLoRA besides LoRA's, and of LoHa and LoKr.
_COMMON = {
    *("auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "peft_version"),
    *("peft_type", "r", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision", "task_type"),
    *("target_modules", "modules_to_save"),
}
_LORA = _COMMON | {
    *("corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_dropout", "lora_ga_config"),
    *("lora_bias", "megatron_core", "qalora_group_size", "runtime_config"),
    *("lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "bias", "target_parameters"),
}
_ADALORA = (_LORA - {"use_dora", "target_parameters"}) | {
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
}
_LYCORIS = _COMMON | {
    *("alpha", "init_weights", "rank_dropout", "module_dropout", "use_effective_conv2d"),
    *("decompose_both", "decompose_factor", "rank_dropout_scale"),
}
_KNOWN = {"LORA": _LORA, "ADALORA": _ADALORA, "LOHA": _LYCORIS, "LOKR": _LYCORIS}
# The fields of the rank and of alpha, where they are not those of LoRA.
_NAMES = {"ADALORA": ("init_r", "lora_alpha"), "LOHA": ("r", "alpha"), "LOKR": ("r", "alpha")}
_FEATURES = {
    "trainable_token_indices": "embeddings were trained besides the adapter",
    "layer_replication": "the base model's layers are repeated",
    "megatron_config": "Megatron's parallel layers are adapted",
    "alora_invocation_tokens": "the update applies to a part of each sequence only",
    "use_qalora": "inputs are pooled in groups before A",
    "use_bdlora": "the factors are block-diagonal",
}
# Tasks for which peft trains and saves a head whether asked to or not.
_HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of peft's configuration that matter after training; the last four are claims, not facts."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trains_biases: bool = False
    lora_bias: bool = False

    def rank_of(self, module: str) -> int:
        """Returns the rank that the configuration gives the module of this name."""
        return _lookup(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str, rank: int) -> float:
        """Returns the factor on B·A for the module of this name: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alpha = _lookup(self.alpha_pattern, module, self.lora_alpha)
        if self.peft_type == "ADALORA":
            # It divides by the rank before the allocation, and adds this to it.
            return alpha / (self.r + 1e-5)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def effective(self) -> dict[str, Any]:
        """Returns the fields that change what the adapter computes."""
        patterns = {"rank_pattern": list(self.rank_pattern.items()), "alpha_pattern": list(self.alpha_pattern.items())}
        method = {"peft_type": self.peft_type, "use_dora": self.use_dora, "use_rslora": self.use_rslora}
        parameters = {"target_parameters": list(self.target_parameters)} if self.target_parameters else {}
        return {"r": self.r, "lora_alpha": self.lora_alpha, **method, **patterns, **parameters}


def parse_config(data: bytes) -> AdapterConfig:
    """
    Parses an `adapter_config.json`, of which no regular expression is ever run; raises `AdapterError`.

    Fields that are not known here may be present only while they are unset (`null`, `false`, zero or empty).
    """
    fields = parse_object(data, CONFIG_NAME)
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _KNOWN:
        raise AdapterError(
            f"`peft_type` is {quote(peft_type)}, expected one of {', '.join(_KNOWN)}: what other methods train is no "
            "update of linear layers"
        )
    _check_features(fields, _KNOWN[peft_type])
    rank, alpha = _NAMES.get(peft_type, ("r", "lora_alpha"))
    # AdaLoRA's own rank pattern says which rows are kept, and the file holds only these.
    patterns = {} if peft_type == "ADALORA" else fields
    return AdapterConfig(
        r=_rank(fields.get(rank), rank),
        lora_alpha=_alpha(fields.get(alpha), alpha),
        peft_type=peft_type,
        use_rslora=_flag(fields, "use_rslora") and peft_type == "LORA",
        use_dora=_flag(fields, "use_dora"),
        rank_pattern=_pattern(patterns.get("rank_pattern"), "rank_pattern", _rank),
        alpha_pattern=_pattern(patterns.get("alpha_pattern"), "alpha_pattern", _alpha),
        base_model=_text(fields, "base_model_name_or_path"),
        revision=_text(fields, "revision"),
        task_type=_text(fields, "task_type"),
        target_modules=_targets(fields),
        target_parameters=_strings(fields, "target_parameters"),
        modules_to_save=_strings(fields, "modules_to_save"),
        trains_biases=fields.get("bias", "none") != "none",
        lora_bias=_flag(fields, "lora_bias"),
    )


def _check_features(fields: Mapping[str, Any], known: Collection[str]) -> None:
    init = fields.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in _PLAIN_INITS:
        raise AdapterError(
            f"`init_lora_weights` is {quote(init)}, which may have changed the base model that the adapter fits. Save "
            "it for the original base with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        )
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"`bias` is {quote(fields['bias'])}, expected none, all or lora_only")
    if (task := fields.get("task_type")) in _HEADED and (heads := fields.get("modules_to_save")):
        raise AdapterError(
            f"`modules_to_save` is {quote(heads)}: it was trained with a head of its own (`task_type` {task}), and "
            "its update fits that head and its labels, not the one of this run. Expected an adapter that leaves the "
            "head alone: one trained with `task_type=None`, or on the same base model for another task"
        )
    for name, value in fields.items():
        if name not in known and value:
            why = _FEATURES.get(name, "it is not known to leave the update at scaling·B·A")
            raise AdapterError(f"`{quote(name)}` is set to {quote(value)}, which is not supported: {why}")


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"`{quote(name)}` is {quote(value)}, expected an integer from 1 to {MAX_RANK}")
    return value


def _alpha(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise AdapterError(f"`{quote(name)}` is {quote(value)}, expected a number above 0 and up to {MAX_ALPHA:g}")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    if not isinstance(value := fields.get(name), bool | None):
        raise AdapterError(f"`{name}` is {quote(value)}, expected true or false")
    return bool(value)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(value := fields.get(name), str | None) or len(value or "") > 4096:
        raise AdapterError(f"`{name}` is {quote(value)}, expected a string of up to 4,096 characters or null")
    return value


def _targets(fields: Mapping[str, Any]) -> str | tuple[str, ...]:
    value = fields.get("target_modules")
    return value if isinstance(value, str) else _strings(fields, "target_modules")


def _strings(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterError(f"`{name}` is {quote(value)}, expected a list of strings or null")
    return tuple(value)


def _pattern(value: Any, name: str, check: Callable[[Any, str], float]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"`{name}` is {quote(value)}, expected an object")
    for key in value:
        literal = key.removeprefix("^")
        if not literal or not _LITERAL.issuperset(literal):
            raise AdapterError(
                f"`{name}` has the key {quote(key)}: a pattern with regular expression characters is not supported, "
                "expected the end of a module's name"
            )
    return {key: check(number, f"{name}[{key}]") for key, number in value.items()}


def _lookup(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first key that peft's regular expression `(.*\\.)?(key)$` would match, without it."""
    return next((value for key, value in pattern.items() if _matches(key, module)), default)


def _matches(key: str, module: str) -> bool:
    literal = key.removeprefix("^")
    head, tail = module[: -len(literal)], module[-len(literal) :]
    whole = not head if key.startswith("^") else not head or head.endswith(".")
    # A dot in a key is peft's "any character", which matters for names such as `a_b` and the key `a.b`.
    return whole and len(tail) == len(literal) and all(a in (".", b) for a, b in zip(literal, tail, strict=True))
