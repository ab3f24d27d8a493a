"""The modes that a single process has: compiled, with gradient checkpointing, in half precision."""

import pytest
import torch
from transformers import TrainerCallback

from mashup_callback import MashupCallback
from tests.tiny import llama, losses, sft_trainer


class Held(TrainerCallback):
    """What the adapter holds when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def run(directory, library, **settings):
    callback, held = MashupCallback(str(library / "trained-*"), on_error="raise"), Held()
    trainer = sft_trainer(directory, callbacks=[callback, held], **settings)
    trainer.train()
    assert callback.report.decision in ("merged", "single")
    return losses(trainer), held.values, callback.report


@pytest.fixture(scope="module")
def plain(tmp_path_factory, library):
    return run(tmp_path_factory.mktemp("plain") / "out", library)


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_same_start_and_same_losses(tmp_path, library, plain, settings):
    values, held, report = run(tmp_path / "out", library, **settings)
    assert values == pytest.approx(plain[0], abs=1e-5)
    assert all(torch.equal(value, plain[1][name]) for name, value in held.items())
    assert report.merged_loss == pytest.approx(plain[2].merged_loss, abs=1e-6)


def test_bfloat16(tmp_path, library, plain):
    values, held, report = run(tmp_path / "out", library, model=llama().bfloat16(), bf16=True)
    assert report.decision == plain[2].decision
    # bfloat16 keeps 8 bits.
    assert values == pytest.approx(plain[0], abs=2e-2)
    for name, value in held.items():
        assert torch.allclose(value.float(), plain[1][name], rtol=2**-7, atol=1e-6), name
