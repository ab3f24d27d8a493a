"""Merges of random mixtures of variants against mergekit's merge of full models, or of updates if it knows no base."""

import zlib
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.formats.variants import find_form
from mashup_callback.lora import merge_factors
from mashup_callback.methods import MergeRule, merge_methods


OUT, IN, NAME, SEED = 24, 20, "0", 42
LORA = partial(LoraConfig, lora_alpha=8)
POOL = {
    "lora of rank 2": LORA(r=2),
    "lora of rank 5": LORA(r=5),
    "rslora": LORA(r=3, use_rslora=True),
    "dora": LORA(r=3, use_dora=True),
    "another dora": LORA(r=6, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10),
    "loha": LoHaConfig(r=2, alpha=4),
    "loha of high rank": LoHaConfig(r=5, alpha=4),
    "lokr": LoKrConfig(r=1, alpha=4, decompose_both=True),
    "lokr of high rank": LoKrConfig(r=6, alpha=4),
}
PARAMETERS = {
    "nearswap": {"t": 0.05},
    "sce": {"select_topk": 0.6},
    "ram": {"epsilon": 1e-2},
    **{method: {"density": 0.6} for method in ("ties", "dare_linear", "dare_ties", "della", "della_linear")},
    **{method: {"density": 0.7, "gamma": 0.05} for method in ("breadcrumbs", "breadcrumbs_ties")},
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# The first of two models is the base, or is the only one.
ORDERED = ("arcee_fusion", "nearswap", "passthrough", "slerp", *RANDOM)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A layer's weight, updates of it by adapters of every variant, and the weights that peft merges these into."""
    torch.manual_seed(0)
    base, updates, weights = torch.randn(OUT, IN) / IN**0.5, {}, {}
    for name, config in POOL.items():
        model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
        model[0].weight.data = base.clone()
        config.target_modules = {NAME}
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter * ("magnitude" in key) + 0.3 * torch.randn_like(parameter))
        path = tmp_path_factory.mktemp("adapter")
        tuned.save_pretrained(path)
        updates[name] = load_factors(read_adapter(path), weight=lambda name: base)
        weights[name] = tuned.merge_and_unload()[0].weight.detach()
    return base, updates, weights


def by_mergekit(rule, base, tuned, weights, dtype):
    """The update in mergekit's merge of full models; of the updates as models for methods that know no base."""
    base = base.to(dtype)
    models = {f"model {index}": weight.to(dtype) for index, weight in enumerate(tuned)}
    given = dict(rule.parameters) | ({"weight": weights} if rule.takes_weights else {})
    on_base = rule.method == "linear" or (rule.needs_base and not rule.interpolates)
    if not on_base:
        models = {name: weight - base for name, weight in models.items()}
    elif rule.needs_base:
        models = {"base": base, **models}
    torch.manual_seed(zlib.crc32(f"{SEED}:{NAME}".encode()))
    merged = merge_state_dicts(
        {name: {NAME: tensor} for name, tensor in models.items()},
        rule.method,
        parameters=given,
        base=next(iter(models)) if rule.needs_base else None,
    )[NAME].double()
    return merged - base if on_base else merged


@pytest.mark.parametrize("method", merge_methods())
@given(
    names=st.lists(st.sampled_from(list(POOL)), min_size=4, max_size=4, unique=True),
    count=st.integers(1, 4),
    weights=st.lists(st.floats(0.1, 1), min_size=4, max_size=4),
    rank=st.integers(1, IN),
)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
def test_a_mixture_of_variants_merges_as_mergekit_merges_models(library, method, names, count, weights, rank):
    base, updates, tuned = library
    rule = MergeRule.create(method, PARAMETERS.get(method))
    low, high = rule.input_range
    count = int(min(max(low, count), high))
    names, weights = names[:count], weights[:count]
    dtype = torch.float32 if method in RANDOM else torch.float64
    exact = by_mergekit(rule, base, [tuned[name] for name in names], weights, dtype)

    merge = partial(merge_factors, method=method, parameters=PARAMETERS.get(method), seed=SEED)
    result = merge([updates[name] for name in names], weights=weights, ranks=rank)
    merged = result.factors[NAME]
    found, energy = merged.delta().double(), torch.linalg.svdvals(exact).square()
    assert torch.isfinite(found).all() and merged.rank <= rank
    if exact.norm() <= 1e-6 * base.norm():
        # What varies between models is kept, so one model alone changes nothing.
        assert method == "sce" and count == 1 and merged.rank == 0
        return
    # The error is compared, because the best cut is not unique where singular values tie.
    error = ((found - exact).norm() ** 2 / energy.sum()).item()
    assert error == pytest.approx((energy[rank:].sum() / energy.sum()).item(), abs=1e-5)
    assert result.kept_energy[NAME] == pytest.approx(1 - error, abs=1e-5)

    if method not in ORDERED:
        turned = merge([updates[name] for name in names[::-1]], weights=weights[::-1], ranks=IN)
        assert (turned.factors[NAME].delta() - exact).norm() < 1e-4 * exact.norm()


def test_a_large_update_of_full_rank_keeps_the_energy_of_a_full_svd():
    """DoRA's update ends in a long tail of small singular values, of which a randomized SVD sees a part."""
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(size, generator=generator) for size in ((700, 640), (8, 640), (700, 8)))
    magnitude = weight.norm(dim=1) * (1 + 0.02 * torch.randn(700, generator=generator))
    parts = {"A": A * 0.1, "B": B * 0.1, "magnitude": magnitude}
    update = find_form("LORA", True, parts).update(parts, 2.0, lambda: weight)
    energy = torch.linalg.svdvals(update.delta().double()).square()
    for inputs, weights in (([update], [1.0]), ([update, update], [0.3, 0.7])):
        result = merge_factors([{NAME: one} for one in inputs], weights=weights, ranks=8)
        assert result.kept_energy[NAME] == pytest.approx((energy[:8].sum() / energy.sum()).item(), rel=1e-3)
