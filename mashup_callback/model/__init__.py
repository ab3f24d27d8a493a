"""The live model, whatever wraps it."""

from .isolation import quantized_layers, random_state, undisturbed, with_adapters, without_adapters
from .layers import (
    adapter_host,
    base_model_name,
    base_weight,
    compute_device,
    expert_parameters,
    layer_shape,
    layer_shapes,
    linear_layers,
    output_head,
    refuse_huge,
    unwrapped,
    weight_norms,
)
from .parameters import (
    clean_name,
    fill_master,
    is_sharded,
    local_part,
    read_parameters,
    regather,
    reshard,
    stream_parameters,
    write_parameters,
)
from .tensors import ModelTensors, describe_model


__all__ = [
    "ModelTensors",
    "adapter_host",
    "base_model_name",
    "base_weight",
    "clean_name",
    "compute_device",
    "describe_model",
    "expert_parameters",
    "fill_master",
    "is_sharded",
    "layer_shape",
    "layer_shapes",
    "linear_layers",
    "local_part",
    "output_head",
    "quantized_layers",
    "random_state",
    "read_parameters",
    "refuse_huge",
    "regather",
    "reshard",
    "stream_parameters",
    "undisturbed",
    "unwrapped",
    "weight_norms",
    "with_adapters",
    "without_adapters",
    "write_parameters",
]
