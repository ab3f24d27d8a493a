"""The controls that need more than a setting of the callback: a random adapter, and PEFT's data-driven inits."""

import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed

from mashup_callback.formats import load_factors, read_adapter
from mashup_callback.lora import save_adapter
from mashup_callback.lowrank import Factors, LoraFactors

from .protocol import Begin, Job
from .worlds import World


INIT_BATCHES = 8


class RandomLikeMerge(TrainerCallback):
    """
    Starts training from a random adapter that has the norms of the merge which the defaults would make.

    A first callback makes the merge and leaves the model alone; its directions are then replaced by random ones,
    written to disk as an adapter, and a second callback starts from that.
    """

    def __init__(self, world: World, job: Job, directory: Path) -> None:
        self.world, self.job = world, job
        self.merge, self.random = directory / "merge", directory / "random"
        self.mashups = [world.mashup(job.task, dry_run=True, report_dir=str(self.merge))]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.mashups[0].on_train_begin(args, state, control, **kwargs)
        adapter = read_adapter(self.merge)
        factors = randomised(load_factors(adapter), self.job.seed)
        save_adapter(self.random, factors, base_model=adapter.config.base_model)
        self.mashups.append(self.world.mashup(self.job.task, [str(self.random)], top_k=1, guard=False))
        self.mashups[1].on_train_begin(args, state, control, **kwargs)


def randomised(factors: Factors, seed: int) -> dict[str, LoraFactors]:
    """
    Returns an adapter with random directions: each layer keeps its rank, the Frobenius norm of its update and the
    ratio of the norms of A and B.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _random_like(update, generator) for name, update in factors.items()}


def _random_like(update: LoraFactors, generator: torch.Generator) -> LoraFactors:
    A = torch.randn(update.A.shape, generator=generator)
    B = torch.randn(update.B.shape, generator=generator)
    A, B = A * (update.A.norm() / A.norm()), B * (update.B.norm() / B.norm())
    drawn = LoraFactors(A, B, update.scaling)
    root = (update.norm() / drawn.norm()) ** 0.5 if drawn.norm() > 0 else 0.0
    return LoraFactors(root * A, root * B, update.scaling)


def eva(world: World, job: Job, directory: Path) -> Begin:
    """PEFT's EVA (arXiv 2410.07170): A from the layers' inputs on the task's data, ranks as they are."""
    base, batches = _base_and_batches(world, job, directory)
    config = _resolved(world, base, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    started = time.perf_counter()
    set_seed(job.seed)
    model = get_peft_model(base, config)
    before = _values(model, ".lora_A.default.weight")
    initialize_lora_eva_weights(model, list(islice(batches, INIT_BATCHES)), show_progress_bar=False)
    seconds = time.perf_counter() - started
    assert_initialized("EVA", before, model)
    return Begin(model, seconds=seconds)


def lora_ga(world: World, job: Job, directory: Path) -> Begin:
    """PEFT's LoRA-GA (arXiv 2407.05000): A and B from the gradient on the task's data, the base changed to match."""
    base, batches = _base_and_batches(world, job, directory)
    config = _resolved(world, base, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def gradients() -> None:
        for batch in islice(batches, INIT_BATCHES):
            base(**batch).loss.backward()

    started = time.perf_counter()
    set_seed(job.seed)
    preprocess_loraga(base, config, gradients)
    set_seed(job.seed)
    model = get_peft_model(base, config)
    seconds = time.perf_counter() - started
    plain = get_peft_model(world.base_model(), world.lora_config())
    assert_initialized("LoRA-GA", _values(plain, ".base_layer.weight"), model)
    return Begin(model, seconds=seconds)


def assert_initialized(method: str, before: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """
    Checks that an initialization changed every parameter that it is meant to: named in a `peft_config` only, both
    methods silently give a plain one.
    """
    for name, value in before.items():
        if torch.equal(value.cpu(), model.get_parameter(name).detach().cpu()):
            raise RuntimeError(f"{method} left {name} as it was: training would start from a plain initialization.")


def _values(model: nn.Module, suffix: str) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith(suffix)}


def _base_and_batches(world: World, job: Job, directory: Path) -> tuple[nn.Module, DataLoader]:
    """The base model and batches of the task's training rows, in the Trainer's own form and on its device."""
    settings = {"steps": job.steps, "learning_rate": job.learning_rate, "peft_config": world.lora_config()}
    trainer = world.trainer(world.base_model(), job.task, job.seed, directory, **settings)
    return world.base_model().to(trainer.args.device), trainer.get_train_dataloader()


def _resolved(world: World, base: nn.Module, **settings) -> LoraConfig:
    # preprocess_loraga reads the target modules before peft resolves a shorthand such as "all-linear".
    probe = get_peft_model(world.base_model(), world.lora_config())
    return world.lora_config(target_modules=sorted(probe.peft_config["default"].target_modules), **settings)
