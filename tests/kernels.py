"""Layers that multiply by the weights themselves, as fused LoRA kernels do."""

from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP


_attention = LlamaAttention.forward


def multiply(layer, x):
    """x Wᵀ + s (x Aᵀ) Bᵀ, read from the parameters of a layer."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    y = F.linear(x, base.weight)
    if base is not layer and not layer.disable_adapters:
        for name in layer.active_adapters:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            y = y + layer.scaling[name] * F.linear(F.linear(x.to(A), A), B)
    return y


class FusedMLP(LlamaMLP):
    def forward(self, x):
        gate, up = multiply(self.gate_proj, x), multiply(self.up_proj, x)
        return multiply(self.down_proj, self.act_fn(gate) * up)


class FusedAttention(LlamaAttention):
    """Its own forward on functions in the place of the layers."""

    def forward(self, hidden_states, **kwargs):
        layers = {name: self._modules.pop(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        for name, layer in layers.items():
            setattr(self, name, lambda x, layer=layer: multiply(layer, x))
        try:
            return _attention(self, hidden_states=hidden_states, **kwargs)
        finally:
            for name, layer in layers.items():
                delattr(self, name)
                self._modules[name] = layer


def fused(model, *kinds):
    for module in model.modules():
        for kind in kinds or (FusedMLP, FusedAttention):
            if type(module) is kind.__base__:
                module.__class__ = kind
    return model
