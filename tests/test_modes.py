"""The modes that a single process has: compiled, with gradient checkpointing, in half precision."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback

from mashup_callback import MashupCallback, score_candidates
from tests.tiny import llama, lora, losses, trained


class Held(TrainerCallback):
    """What the adapter holds when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def run(directory, library, **settings):
    callback, held = MashupCallback(str(library / "trained-*"), on_error="raise"), Held()
    trainer = trained(directory, callback, held, **settings)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["adapter in float16", "adapter in float32"])
def test_float16(tmp_path, library, plain, dtype):
    # By itself, peft keeps the adapter of a half precision model in float32.
    settings = {"autocast_adapter_dtype": dtype == torch.float32}
    # The fresh adapter is that of the Trainer, which sets its seed first.
    torch.manual_seed(42)
    model = get_peft_model(llama().half(), lora(), **settings)
    values, held, report = run(tmp_path / "out", library, model=model)
    assert report.decision == plain[2].decision
    # float16 keeps 11 bits, also of the fresh A, as large as which the written A is.
    assert report.merged_loss == pytest.approx(plain[2].merged_loss, abs=2e-3)
    for name, value in held.items():
        assert value.dtype == dtype and torch.allclose(value.float(), plain[1][name], rtol=2**-10, atol=1e-6), name
    saved = PeftModel.from_pretrained(llama().half(), tmp_path / "out/mashup", is_trainable=True, **settings)
    loaded = trained(tmp_path / "loaded", model=saved)
    assert values[0] == losses(loaded)[0]


def test_scores_in_float16_are_the_losses_of_peft(library):
    tokens = torch.randint(7, 87, (4, 12), generator=torch.Generator().manual_seed(0))
    paths = sorted(library.glob("*-*"))
    for score in score_candidates(llama().half(), paths, [{"input_ids": tokens, "labels": tokens}]):
        model = PeftModel.from_pretrained(llama().half(), score.candidate.path).eval()
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1].float()
        # A hundredth of the update shows at this tolerance; rounding to 11 bits in another order does not.
        assert score.loss == pytest.approx(
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), abs=1e-4
        )
