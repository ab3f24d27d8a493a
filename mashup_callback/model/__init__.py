"""The live model, whatever wraps it."""

from .isolation import quantized_layers, random_state, undisturbed, with_adapters, without_adapters
from .layers import (
    adapter_host,
    base_model_name,
    compute_device,
    expert_parameters,
    layer_shape,
    layer_shapes,
    linear_layers,
    output_head,
    unwrapped,
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
from .weights import BaseWeights
from .whole import WholeParameter, replaced, whole_parameters


__all__ = [
    "BaseWeights",
    "ModelTensors",
    "WholeParameter",
    "adapter_host",
    "base_model_name",
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
    "regather",
    "replaced",
    "reshard",
    "stream_parameters",
    "undisturbed",
    "unwrapped",
    "whole_parameters",
    "with_adapters",
    "without_adapters",
    "write_parameters",
]
