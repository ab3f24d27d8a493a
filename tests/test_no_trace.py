"""Whatever is trained, decided or interrupted: besides the trainee's values, everything is as it was."""

import collections
import contextlib
import hashlib
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from mashup_callback import MashupCallback, pipeline
from tests.tiny import (
    llama,
    lora,
    rows,
    save_random_adapter,
    stream,
    tokenizer,
    trainer_settings,
)


HOOKS = [name for name in vars(torch.nn.Module()) if name.endswith("hooks")]
FLAGS = ("is_grad_enabled", "get_default_dtype", "get_num_threads", "is_autocast_enabled")


def digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def parameter(value):
    return id(value), value.requires_grad, value.grad is None, value.dtype, value.data_ptr()


def module(value):
    hooks = {name: list(map(id, getattr(value, name).values())) for name in HOOKS}
    # The tag for the model card is meant to stay.
    return id(value), value.training, sorted(vars(value).keys() - {"model_tags"}), hooks


def opened():
    found = collections.Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


def look(directory, model, optimizer, lr_scheduler, train_dataloader, args):
    """Everything that a run could leave behind, in forms that can be compared."""
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    collator = getattr(train_dataloader.collate_fn, "__dict__", {})
    written = {str(path) for path in directory.rglob("*") if path.parent.name != "mashup" and path.name != "mashup"}
    return {
        "parameters": {name: parameter(value) for name, value in model.named_parameters()},
        "trained": {name: digest(value) for name, value in model.named_parameters() if value.requires_grad},
        "frozen": {name: digest(value) for name, value in model.named_parameters() if not value.requires_grad},
        "buffers": {name: (id(value), digest(value)) for name, value in model.named_buffers()},
        "modules": {name: module(value) for name, value in model.named_modules()},
        "config": (model.config.to_dict(), model.generation_config.to_dict(), sorted(vars(model.config))),
        "optimizer": (groups, list(optimizer.state), lr_scheduler.state_dict()),
        "data": (id(train_dataloader.dataset), id(train_dataloader.collate_fn), repr(collator)),
        "arguments": args.to_dict(),
        "random": (random.getstate(), str(np.random.get_state()), digest(torch.get_rng_state())),
        "torch": {name: getattr(torch, name)() for name in FLAGS},
        "environment": (dict(os.environ), os.getcwd(), sys.path[:], signal.getsignal(signal.SIGTERM)),
        "written": written | set(os.listdir(tempfile.gettempdir())),
        "open": opened(),
        "threads": (sorted(map(str, threading.enumerate())), len(os.listdir("/proc/self/task"))),
        "logging": (logging.root.level, logging.root.handlers[:], logging.getLogger("transformers").level),
        "others": (len(warnings.filters), len(tqdm._instances), torch.nn.modules.module._global_forward_hooks.copy()),
    }


class Interruption(KeyboardInterrupt):
    pass


class Done(Exception):  # noqa: N818
    pass


class Before(TrainerCallback):
    """Edits the model as other callbacks do, then looks; the last callback looks again."""

    def __init__(self, directory, edit, interrupt):
        self.directory, self.edit, self.interrupt, self.passes = directory, edit, interrupt, 0

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler, train_dataloader, **kwargs):
        EDITS[self.edit](model)
        if self.interrupt:
            model.register_forward_pre_hook(self.stop)
        self.look = partial(look, self.directory, model, optimizer, lr_scheduler, train_dataloader, args)
        self.seen = self.look()

    def stop(self, *args):
        self.passes += 1
        if self.passes == self.interrupt:
            raise Interruption


class After(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise Done


def base_layer(model):
    return next(value for name, value in model.named_modules() if name.endswith("up_proj"))


def freeze_some(model):
    for name, value in model.named_parameters():
        if "layers.1.mlp" in name:
            value.requires_grad_(False)


EDITS = {
    "nothing": lambda model: None,
    "cache": lambda model: setattr(model.config, "use_cache", True),
    "hook": lambda model: base_layer(model).register_forward_hook(lambda module, args, output: output * 1.0),
    "evaluation": lambda model: base_layer(model).train(False),
    "frozen": freeze_some,
    "buffer": lambda model: base_layer(model).register_buffer("seen", torch.zeros(1), persistent=False),
    "gradient": lambda model: [setattr(p, "grad", torch.ones_like(p)) for p in model.parameters() if p.requires_grad],
}
MODELS = {
    "peft_config": llama,
    "tied": partial(llama, tie_word_embeddings=True),
    "bf16": lambda: llama().bfloat16(),
    "eager": partial(llama, attn_implementation="eager"),
    "peft": lambda: get_peft_model(llama(), lora(lora_dropout=0.2)),
}
DATA = {name: partial(rows, name) for name in ("text", "chat", "prompt_completion")} | {"stream": stream}


def with_model_init(directory, callbacks, **arguments):
    """transformers' own Trainer makes the model itself."""

    def model_init():
        model = llama()
        model.add_adapter(lora())
        return model

    names = vars(TrainingArguments("x", report_to="none"))
    values = {name: value for name, value in trainer_settings(directory, **arguments).items() if name in names}
    data = rows().map(lambda row: tokenizer()(row["text"]), remove_columns=["text"])
    return Trainer(
        args=TrainingArguments(**values),
        train_dataset=data,
        eval_dataset=data,
        model_init=model_init,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        callbacks=callbacks,
    )


def build(run, directory, callbacks):
    arguments = {name: True for name in ("bf16", "gradient_checkpointing", "packing") if run[name]}
    if run["stops_early"]:
        arguments |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        callbacks = [EarlyStoppingCallback(1), *callbacks]
    if run["kind"] == "model_init":
        return with_model_init(directory, callbacks, **arguments)
    has_adapter = run["kind"] == "full" or run["model"] == "peft"
    return SFTTrainer(
        llama() if run["kind"] == "full" and run["model"] == "peft" else MODELS[run["model"]](),
        args=SFTConfig(**trainer_settings(directory, **arguments)),
        train_dataset=DATA[run["data"]](),
        eval_dataset=rows(run["data"].replace("stream", "text")),
        processing_class=tokenizer(),
        peft_config=None if has_adapter else lora(),
        callbacks=callbacks,
    )


RUNS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["lora", "lora", "full", "model_init"]),
        "model": st.sampled_from(sorted(MODELS)),
        "data": st.sampled_from(sorted(DATA)),
        "edit": st.sampled_from(sorted(EDITS)),
        "bf16": st.booleans(),
        "gradient_checkpointing": st.booleans(),
        "packing": st.booleans(),
        "stops_early": st.booleans(),
        "quality": st.sampled_from(["good", "bad", "broken"]),
        "interrupt": st.one_of(st.just(0), st.integers(1, 12)),
        "mashup": st.fixed_dictionaries(
            {
                "guard": st.booleans(),
                "top_k": st.sampled_from([1, 2, "auto"]),
                "search": st.sampled_from(["racing", "exhaustive"]),
                "metric": st.sampled_from(["loss", "token_accuracy"]),
                "merge_method": st.sampled_from(["linear", "ties", "dare_linear"]),
                "on_error": st.sampled_from(["scratch", "raise"]),
                "dry_run": st.booleans(),
            }
        ),
    }
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Good, bad and broken candidates of each kind; temporary files go to a directory of their own."""
    root = tmp_path_factory.mktemp("shelf")
    for seed in range(2):
        save_random_adapter(root / f"lora/good/{seed}", seed, scale=0.02)
        save_random_adapter(root / f"lora/bad/{seed}", seed, scale=3.0)
        save_random_adapter(root / f"lora/broken/{seed}", seed)
        for quality, scale in {"good": 0.001, "bad": 1.0, "broken": 0.001}.items():
            model = llama()
            for value in model.parameters():
                value.data += scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            model.save_pretrained(root / f"full/{quality}/{seed}", max_shard_size="20KB")
    for path in root.glob("*/broken/0/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    for path in root.glob("*/broken/1/*config.json"):
        path.write_text("{")
    (root / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "tmp"))
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        # What is imported and started once and for all is no trace of a run.
        for kind in ("lora", "full"):
            leave_no_trace(root, RUN | {"kind": kind, "quality": "good"}, check=False)
        yield root


RUN = {"model": "eager", "data": "text", "edit": "nothing", "bf16": False, "gradient_checkpointing": False}
RUN |= {"packing": False, "stops_early": False, "interrupt": 0, "mashup": {"guard": False, "top_k": 2}}


def leave_no_trace(root, run, check=True):
    """Runs up to the first step, looks before and after the mashup, and returns what it decided."""
    directory = Path(tempfile.mkdtemp(dir=root)) / "out"
    before = Before(directory, run["edit"], run["interrupt"])
    specs = str(root / ("full" if run["kind"] == "full" else "lora") / run["quality"] / "*")
    mashup = MashupCallback(specs, sample_size=8, **run["mashup"])
    trainer = build(run, directory, [before, mashup, After()])
    with mock.patch.object(pipeline, "check_swap", side_effect=pipeline.check_swap) as swapped:
        try:
            trainer.train()
        except (Done, Interruption):
            pass
        except Exception:
            assert run["mashup"].get("on_error") == "raise"
    after = before.look()
    for name, expected in before.seen.items() if check else ():
        assert after[name] == expected or (name == "trained" and swapped.called), name
    return mashup.report


@settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(RUNS)
def test_no_trace(shelf, run):
    leave_no_trace(shelf, run)


def test_layers_of_the_adapter_that_the_user_froze(shelf):
    report = leave_no_trace(shelf, RUN | {"kind": "lora", "quality": "good", "edit": "frozen"})
    assert report.decision == "merged" and all(".1.mlp." in name for name in report.merge.lost_layers)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RUNS)
def test_no_trace_of_many_runs(shelf, run):
    """Some minutes on an idle machine."""
    leave_no_trace(shelf, run)
