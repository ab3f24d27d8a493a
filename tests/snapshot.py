"""The state of a model and of random numbers around the callback."""

import random

import numpy as np
import torch
from peft import PeftModel
from transformers import TrainerCallback

from tests.tiny import trained


class Snapshot(TrainerCallback):
    """What a model and the random number generators look like when training begins."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.parameters = {name: id(value) for name, value in model.named_parameters()}
        self.optimized = [id(value) for group in optimizer.param_groups for value in group["params"]]
        self.flags = {name: value.requires_grad for name, value in model.named_parameters()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        self.active = list(model.active_adapters) if isinstance(model, PeftModel) else model.active_adapters()
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.random = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        self.use_cache = model.config.use_cache


def run_with_snapshots(output_dir, callback, **settings):
    before, after = Snapshot(), Snapshot()
    return trained(output_dir, before, callback, after, **settings), before, after
