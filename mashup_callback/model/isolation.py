"""Looking at a model without leaving a trace on it or on the random numbers that follow."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layers import adapter_host


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context in which `model` is in evaluation mode without gradients, and after which everything is as it was."""
    training = [(module, module.training) for module in model.modules()]
    try:
        # What is compiled would be compiled again for each candidate's hooks, up to a limit that training needs.
        eager = torch.compiler.set_stance("force_eager")
        with random_state(), torch.no_grad(), _no_cache(model), _rotations_kept(model), eager:
            model.eval()
            # In evaluation mode on a CPU, 4-bit ones repack their weights and round their scales for good, and have
            # no gradient from then on; 8-bit ones round their inputs too.
            for layer in quantized_layers(model):
                layer.training = True
            yield
    finally:
        for module, flag in training:
            module.training = flag


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the linear layers that bitsandbytes quantized; none where its package was never imported."""
    library = sys.modules.get("bitsandbytes")
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt) if library else ()
    return [module for module in model.modules() if isinstance(module, kinds)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters on `model`, of whichever library, are off: it computes what its base does."""
    # Switching adapters off and on again sets requires_grad of every adapter as if it were the active one.
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with _adapters_off(adapter_host(model)):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def with_adapters(model: nn.Module) -> Iterator[None]:
    """Context within that of [`without_adapters`] in which the adapters are on again."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    off = [module for module in model.modules() if isinstance(module, kinds) and module.disable_adapters]
    for module in off:
        module.enable_adapters(True)
    try:
        yield
    finally:
        for module in off:
            module.enable_adapters(False)


@contextmanager
def _adapters_off(host: nn.Module | None) -> Iterator[None]:
    if isinstance(host, PeftModel):
        with host.disable_adapter():
            yield
    elif getattr(host, "_hf_peft_config_loaded", False):
        host.disable_adapters()
        try:
            yield
        finally:
            host.enable_adapters()
    else:
        yield


@contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Context, seeded with `seed` if it is given, after which the random number generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    device_type = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cuda"
    devices = range(torch.accelerator.device_count())
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type):
            if seed is not None:
                random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _rotations_kept(model: nn.Module) -> Iterator[None]:
    """Context after which dynamic rotary embeddings, which grow with the longest row so far, are as they were."""
    rotary = [module for module in model.modules() if hasattr(module, "max_seq_len_cached")]
    before = [(module, {**vars(module)}, {**module._buffers}) for module in rotary]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.update(buffers)


@contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    config = getattr(extract_model_from_parallel(model), "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
