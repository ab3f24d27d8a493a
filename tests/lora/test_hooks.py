"""Updates by hooks against peft's own layers, for every sharing of inputs and every data type."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.models.llama.modeling_llama import LlamaMLP

from mashup_callback import score_candidates
from mashup_callback.errors import BypassedError
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.lora.hooks import applied
from mashup_callback.lowrank import LoraFactors
from mashup_callback.model.layers import layer_shapes
from tests.kernels import FusedAttention, FusedMLP, fused
from tests.tiny import LINEAR, llama, lora, save_random_adapter


IDS = torch.arange(7, 31).view(2, 12)


def hooked(path, model=None):
    model = (model or llama()).eval()
    with torch.no_grad(), applied(model, load_factors(read_adapter(path))):
        return model(IDS).logits


def by_peft(path, model=None):
    with torch.no_grad():
        return PeftModel.from_pretrained(model or llama(), path).eval()(IDS).logits


@pytest.mark.parametrize(
    "targets",
    [LINEAR, ["q_proj", "v_proj"], ["k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj"], ["down_proj", "lm_head"]],
    ids="-".join,
)
def test_equals_peft(tmp_path, targets):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0, target_modules=targets)
    torch.testing.assert_close(hooked(path), by_peft(path), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hooked(path), llama()(IDS).logits, atol=1e-2)


def test_equals_peft_with_ranks_that_differ(tmp_path):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0, rank_pattern={"k_proj": 2, "up_proj": 7})
    torch.testing.assert_close(hooked(path), by_peft(path), atol=1e-5, rtol=1e-5)


class Quantized(torch.nn.Module):
    """As GPTQ and AWQ keep a linear layer: in buffers."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.data)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight)


def test_layers_without_parameters(tmp_path):
    path, model = save_random_adapter(tmp_path / "a", 0, scale=1.0), llama()
    for name in LINEAR[4:]:
        for layer in model.model.layers:
            setattr(layer.mlp, name, Quantized(getattr(layer.mlp, name)))
    torch.testing.assert_close(hooked(path, model), by_peft(path), atol=1e-5, rtol=1e-5)


def test_half_precision_computes_the_update_as_peft_does(tmp_path):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    ours, theirs = hooked(path, llama().bfloat16()), by_peft(path, llama().bfloat16())
    assert ours.dtype == torch.bfloat16
    # Each rounds its bfloat16 sums once more here and there.
    assert (ours - theirs).abs().max() <= 2**-5 * theirs.abs().max()


def test_layers_with_the_same_input_share_one_product(tmp_path, monkeypatch):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    model, shapes = llama().eval(), []
    factors = load_factors(read_adapter(path))
    original = torch.mm

    def mm(x, weights):
        shapes.append(tuple(weights.shape))
        return original(x, weights)

    with torch.no_grad(), applied(model, factors):
        monkeypatch.setattr(torch, "mm", mm)
        model(IDS)
    # Of rank 4: q, k and v; o; gate and up; down, in each of two layers.
    assert sorted(ranks for _, ranks in shapes) == [4, 4, 4, 4, 8, 8, 12, 12]


def test_layers_of_one_block_with_other_inputs_are_computed_apart():
    """k is given another tensor than q, and v that tensor after it was changed in place."""
    generator = torch.Generator().manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in names})
    factors = {
        name: LoraFactors(torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), 0.5)
        for name in names
    }
    x, y = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    inputs = dict(zip(names, (x, y, 2 * y), strict=True))
    expected = {name: inputs[name] @ (layers[name].weight + factors[name].delta()).T for name in names}
    with torch.no_grad(), applied(layers, factors):
        found = {"q_proj": layers["q_proj"](x), "k_proj": layers["k_proj"](y), "v_proj": layers["v_proj"](y.mul_(2))}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def test_nothing_is_left_behind(tmp_path):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    model = llama().eval()
    before = model(IDS).logits
    parameters = {name: value.clone() for name, value in model.named_parameters()}
    hooked(path, model)
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_reach_the_factors_and_not_the_model(tmp_path):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    reference = PeftModel.from_pretrained(llama(), path, is_trainable=True).eval()
    reference(IDS, labels=IDS).loss.backward()
    model = llama().eval().requires_grad_(False)
    factors = load_factors(read_adapter(path))
    for update in factors.values():
        update.A.requires_grad_(), update.B.requires_grad_()
    with applied(model, factors):
        model(IDS, labels=IDS).loss.backward()
    for name, module in reference.named_modules():
        if hasattr(module, "lora_A"):
            update = factors[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(update.A.grad, module.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(update.B.grad, module.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "count"), [(FusedMLP, 6), (FusedAttention, 8)])
@pytest.mark.parametrize("adapted", [False, True])
def test_layers_that_are_bypassed_are_told(tmp_path, kind, count, adapted):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0)
    model = fused(get_peft_model(llama(), lora()).eval() if adapted else llama(), kind)
    with pytest.raises(BypassedError, match=f"{count} of the 14 layers .*model.layers.0.*fused"):
        hooked(path, model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_bypassed_do_not_matter_to_an_adapter_of_others(tmp_path):
    path = save_random_adapter(tmp_path / "a", 0, scale=1.0, target_modules=["q_proj", "v_proj"])
    torch.testing.assert_close(hooked(path, fused(llama(), FusedMLP)), by_peft(path), atol=1e-5, rtol=1e-5)


def test_several_candidates_in_layers_that_are_bypassed(tmp_path):
    paths = [save_random_adapter(tmp_path / str(seed), seed) for seed in range(3)]
    with pytest.raises(BypassedError, match="bypass 6 layers"):
        score_candidates(fused(llama(), FusedMLP), paths, [{"input_ids": IDS, "labels": IDS}])


class Experts(torch.nn.Module):
    """Experts of which only the first one is ever chosen, as modules or as lists of layers."""

    def __init__(self, listed):
        super().__init__()
        self.listed = listed
        if listed:
            self.up = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
            self.down = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
        else:
            self.experts = torch.nn.ModuleList(LlamaMLP(llama().config) for _ in range(3))

    def forward(self, x):
        return self.down[0](self.up[0](x)) if self.listed else self.experts[0](x)


@pytest.mark.parametrize("listed", [False, True])
def test_experts_without_tokens_and_skipped_blocks_are_not_bypassed(tmp_path, listed):
    torch.manual_seed(0)
    model = llama(num_hidden_layers=3)
    for block in model.model.layers:
        block.mlp = Experts(listed)
    # The model runs the first two blocks only, as with LayerDrop.
    model.config.num_hidden_layers = 2
    model.vision = torch.nn.ModuleList([LlamaMLP(model.config)])
    factors = {
        name: LoraFactors(torch.ones(1, shape[0]), torch.ones(shape[1], 1), 0.01)
        for name, shape in layer_shapes(model).items()
    }
    assert sum(".mlp." in name for name in factors) == 3 * (6 if listed else 9) and "vision.0.up_proj" in factors
    before = model.eval()(IDS).logits
    with torch.no_grad(), applied(model, factors):
        assert not torch.allclose(model(IDS).logits, before)
