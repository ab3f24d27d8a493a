"""Adapters of other kinds than LoRA of linear layers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.hostile.cases.case import HEAD, PREFIX, QA, QB, Case, Q
from tests.hostile.damage import WEIGHTS, Change, both, fields, filled, mapped, put, tensors, zeros
from tests.tiny import llama


def kind(base: str, name: str, change: Change, reason: str | None = None, **settings: Any) -> Case:
    return Case("other kinds of adapters", f"{base}: {name}", change, reason, base, **settings)


def part(name: str, module: str = Q) -> str:
    return f"{PREFIX}{module}.{name}"


def drop(*names: str, module: str = Q) -> Change:
    return tensors(lambda found: [found.pop(part(name, module)) for name in names])


def as_it_is(directory: Path) -> None:
    pass


def _row_of_zeros(directory: Path) -> None:
    """A row of which DoRA leaves nothing, and which it divides by its norm."""
    row = llama().model.layers[0].self_attn.q_proj.weight[0].detach()

    def edit(found: dict[str, torch.Tensor]) -> None:
        found[QA][:], found[QB][:] = 0.0, 0.0
        found[QA][0], found[QB][0, 0] = row, -0.5

    tensors(edit)(directory)


def ranks(count: int) -> Change:
    """Keeps the first ones of AdaLoRA."""
    rows = [mapped(lambda v: v[:count], part=end) for end in ("lora_A", "lora_E")]
    return both(*rows, mapped(lambda v: v[:, :count], part="lora_B"))


def _fewer_rows(directory: Path) -> None:
    """As AdaLoRA saves an adapter after it has cut the ranks from 5 to 2."""
    ranks(2)(directory)
    names = [key.removeprefix(PREFIX) for key in load_file(directory / WEIGHTS) if key.endswith("lora_E")]
    fields(rank_pattern={name: [True] * 2 + [False] * 3 for name in names})(directory)


def _of_rank(rank: int) -> Change:
    """LoHa of a rank whose square is the rank of the update's factors."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for key, tensor in found.items():
            shape, value = ((len(tensor), rank), 0.1) if key.endswith("a") else ((rank, tensor.shape[1]), 1 / rank)
            found[key] = torch.full(shape, value)

    return both(tensors(edit), fields(r=rank))


def _magnitudes(directory: Path) -> None:
    """Those of DoRA for all modules."""
    fields(use_dora=True)(directory)
    sizes = {key: len(value) for key, value in load_file(directory / WEIGHTS).items() if "lora_B" in key}
    put(**{key.replace("B.weight", "magnitude_vector"): torch.ones(size) for key, size in sizes.items()})(directory)


def _hidden_copy(directory: Path) -> None:
    """Other embeddings, and the right ones under another name that is read after them."""
    extra_key = COPY.replace("base_layer.", "")
    tensors(lambda found: found.update({extra_key: found[COPY], COPY: torch.zeros(96, 32)}))(directory)


def moved_parts(old: str, new: str, keep: bool = False) -> Change:
    """Renames tensors of the experts, or adds zeros under the new name."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if old in key]:
            value = torch.zeros_like(found[key]) if keep else found.pop(key)
            found[key.replace(old, new)] = value

    return tensors(edit)


def experts_apart(**layers: int) -> Change:
    """Adds factors of layers of one expert, of so many outputs, to an adapter of rank 4."""
    As = {part("lora_A.weight", f"{EXPERTS}.0.{name}"): torch.ones(4, 32) for name in layers}
    Bs = {part("lora_B.weight", f"{EXPERTS}.0.{name}"): torch.ones(rows, 4) for name, rows in layers.items()}
    return put(**As, **Bs)


QM, COPY = part("lora_magnitude_vector"), part("base_layer.weight", "model.embed_tokens")
EXPERTS = "model.layers.0.mlp.experts"
EA, EB = part("lora_A.weight", EXPERTS), part("lora_B.weight", EXPERTS)
CASES = [
    *[
        kind(base, "as it is", as_it_is)
        for base in ("dora", "adalora", "loha", "lokr", "embeddings", "experts", "whole")
    ],
    # DoRA: a magnitude for each output.
    kind("dora", "no magnitude", drop("lora_magnitude_vector"), "lora_magnitude_vector is missing"),
    kind("dora", "magnitudes of LoRA", fields(use_dora=False), "parts of DoRA, and `use_dora` is not set"),
    *[
        kind("dora", f"magnitude of shape {shape}", put(**{QM: torch.ones(shape)}), "has shape")
        for shape in ((), (1,), (32, 1), (0,))
    ],
    kind("dora", "a magnitude that is none", filled(QM, float("nan")), "the value nan"),
    kind("dora", "a huge magnitude", filled(QM, 1e18), r"the value 1e\+18"),
    kind("dora", "magnitudes of zero", mapped(torch.zeros_like, part="magnitude")),
    kind("dora", "magnitudes below zero", mapped(torch.neg, part="magnitude")),
    kind("dora", "a row divided by nothing", _row_of_zeros, "times as large as the weight"),
    kind("dora", "without a model", as_it_is, "there is no base model here to read", taker="nobody"),
    # AdaLoRA: a number for each rank.
    kind("adalora", "no numbers", drop("lora_E"), "lora_E is missing"),
    kind("adalora", "one number for all ranks", put(**{part("lora_E"): torch.ones(1, 1)}), "lora_E has shape"),
    kind("adalora", "one number for each input", put(**{part("lora_E"): torch.ones(1, 32)}), "lora_E has shape"),
    kind("adalora", "a factor that is a number", put(**{part("lora_A"): torch.ones(())}), "make no update"),
    kind("adalora", "a number that is none", filled(part("lora_E"), float("inf")), "holds the value inf"),
    kind("adalora", "no ranks at all", ranks(0), "all its ranks are zero"),
    kind("adalora", "more ranks than it began with", fields(init_r=3), "has rank 5, but .* says 3"),
    kind("adalora", "fewer ranks than it began with", _fewer_rows),
    kind("adalora", "an absurd rank", fields(init_r=10**8), "`init_r` is 100000000"),
    kind("adalora", "with magnitudes", fields(use_dora=True), "`use_dora` is set to"),
    # LoHa and LoKr: products of updates.
    kind("loha", "a factor is missing", drop("hada_w2_b"), "hada_w2_b is missing"),
    kind("loha", "two are missing", drop("hada_w1_a", "hada_w2_b"), "hada_w1_a and hada_w2_b is missing"),
    kind("loha", "ranks that differ", zeros(part("hada_w1_b"), 3, 32), "the ranks differ"),
    kind("loha", "another rank", fields(r=7), "has rank 2, but .* says 7"),
    kind("loha", "products of two shapes", zeros(part("hada_w2_b"), 2, 31), "different shapes"),
    kind("loha", "a convolution", zeros(part("hada_t1"), 2, 2, 3, 3), "this is a convolution"),
    kind("loha", "factors of LoRA besides", zeros(QA, 4, 32), "unexpected tensor .*lora_A"),
    kind("loha", "a number that is none", filled(part("hada_w1_a"), float("nan")), "holds the value nan"),
    kind("loha", "huge products", mapped(lambda v: 0 * v + 9000.0), "times as large as the weight"),
    kind("loha", "a rank of a thousand", _of_rank(1024)),
    kind("loha", "an absurd rank", fields(r=10**8), "`r` is 100000000"),
    kind("loha", "an absurd alpha", fields(alpha=1e30), "`alpha` is 1e"),
    kind("lokr", "a factor twice", zeros(part("lokr_w1"), 4, 4), "parts of more than one update"),
    kind("lokr", "another size", zeros(part("lokr_w1_a"), 5, 1), "maps 32 features to 40, expected 32"),
    # Embeddings: the base model's weights are saved besides.
    kind("embeddings", "other embeddings", filled(COPY, 1.0), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings that are none", filled(COPY, float("nan")), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings in a row", zeros(COPY, 96 * 32), "embed_tokens.*would overwrite"),
    kind("embeddings", "embeddings under two names", _hidden_copy, "under two names"),
    kind("embeddings", "without a model", as_it_is, "no base model here to compare", taker="nobody"),
    kind("embeddings", "where all weights are trained", as_it_is, "embed_tokens, an embedding or", taker="model"),
    # Experts that are parts of one parameter, which are wrapped one around the other.
    kind("experts", "parameters that are none", fields(target_parameters=["mlp.experts.gate"]), "no weights of"),
    kind("experts", "one parameter for two", fields(target_parameters=["mlp.experts.down_proj"]), "no weights of"),
    kind("experts", "no parameters", fields(target_parameters=None), "has rank 16, but adapter_config.json says 4"),
    kind("experts", "another rank", fields(r=5, rank_pattern={"q_proj": 4}), "4 experts of rank 5, .* 16 ranks"),
    kind("experts", "a factor is missing", drop("lora_A.weight", module=EXPERTS), "lora_A.weight is missing"),
    kind("experts", "too wide", zeros(EA, 16, 17), "experts.*maps 17 features"),
    kind("experts", "a number that is none", filled(EB, float("nan")), "experts.* holds the value nan"),
    kind("experts", "wrapped twice", moved_parts("experts.base_layer", "experts.base_layer.base_layer"), "no weights"),
    kind(
        "experts",
        "factors under two names",
        moved_parts("layers.0.mlp.experts.base_layer", "layers.base_layer.0.mlp.experts", keep=True),
        "layers.base_layer.0.mlp.experts has rank 16",
    ),
    kind("experts", "magnitudes", _magnitudes, "magnitudes of DoRA, expected none for experts"),
    kind("experts", "without a model", as_it_is, "several experts at once, and there is", taker="nobody"),
    kind("experts", "where all weights are trained", as_it_is, "or experts in one parameter", taker="experts' model"),
    # Layers of single experts, as older models have them, for a model that has all experts in one parameter.
    *[
        kind("adapter", f"a single expert's {name}", experts_apart(**layers), reason, taker="experts")
        for name, layers, reason in (
            ("layer under two names", {"gate_proj": 16, "w1": 16}, "under two names"),
            ("halves of two shapes", {"gate_proj": 16, "up_proj": 17}, "projections of one expert have different"),
        )
    ],
    # A head that is trained whole besides the factors.
    kind("whole", "where it is not trained", as_it_is, "was trained besides the adapter", taker="adapter"),
    kind("whole", "no tensor of it", tensors(lambda found: found.pop(f"{PREFIX}{HEAD}")), "expected tensors of these"),
    kind("whole", "a cube", zeros(f"{PREFIX}{HEAD}", 2, 3, 4), "expected a matrix or a vector"),
    kind("whole", "no rows", zeros(f"{PREFIX}{HEAD}", 0, 32), "expected a matrix or a vector"),
    kind("whole", "names without end", fields(modules_to_save=["a"] * 200_000), "more than it needs"),
]
