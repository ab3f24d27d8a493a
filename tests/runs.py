"""Short runs of either kind of training, in processes of their own too, and what they leave behind."""

import hashlib
import os
import sys

import torch

from mashup_callback import MashupCallback
from tests.full_model import full_trainer
from tests.tiny import losses, sft_trainer


TRAINERS = {"lora": sft_trainer, "full": full_trainer}
MASHUP = "out/mashup"


def build(kind, output, specs, **values):
    callback = MashupCallback(str(specs), sample_size=8, guard=False, **values)
    torch.manual_seed(0)
    return TRAINERS[kind](output, callbacks=[callback], max_steps=1), callback


def train(kind, output, specs, **values):
    """Returns the report, and what tells one start from another: the loss of the first step."""
    trainer, callback = build(kind, output, specs, **values)
    trainer.train()
    return callback.report, losses(trainer)


def losses_without(kind, directory):
    torch.manual_seed(0)
    trainer = TRAINERS[kind](directory / "alone", max_steps=1)
    trainer.train()
    return losses(trainer)


def begin(function):
    """Calls a function in a process of its own, whose number is returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
        finally:
            os._exit(code)
    return child


def forked(function):
    """Returns how a process that calls a function ended."""
    return os.waitpid(begin(function), 0)[1]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def hidden(directory):
    return [path.name for path in directory.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def owned(home):
    """The hash of every file, or the target of a link, except in the mashup's own directory; empty directories too."""
    paths = [path for path in sorted(home.rglob("*")) if MASHUP not in path.relative_to(home).as_posix()]
    return {str(path.relative_to(home)): _state(path) for path in paths}


def _state(path):
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
