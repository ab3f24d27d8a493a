"""One hostile adapter or checkpoint, and the names that the collection shares."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.hostile.damage import Change, content


@dataclass(frozen=True, eq=False)
class Case:
    """What is done to a copy of a good adapter or checkpoint."""

    # The row of the table of outcomes.
    kind: str
    name: str
    change: Change
    # What the reason for its rejection says; None where it is harmless.
    reason: str | None = None
    # What is copied: `adapter`, one of another kind, `model` (in shards) or `tied` (the head is the embeddings).
    base: str = "adapter"
    # Which trainee it is a candidate of where that does not follow from what is copied.
    taker: str = ""
    # Whether it may as well be taken, and then computes what peft computes.
    either: bool = False
    # Fields that peft is given in the place of claims that it would run, or fail on.
    own: Mapping[str, Any] = field(default_factory=dict)
    # What happens after its description was read.
    later: Change | None = None
    # The field of `LoraConfig` that is changed.
    field: str = ""
    # The size that the Hub states for its weights.
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


REGEX = "(a+)+" * 50 + "$"
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
QA, QB = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
BROKEN = "truncated, padded or no safetensors"
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


PICKLE = pickle.dumps(_Bomb())
CODE = content("modeling.py", "import os; os.mkdir('executed')")
