"""4-bit and 8-bit bases of bitsandbytes: scored and trained as peft would, and left alone to the bit."""

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from mashup_callback import MashupCallback, score_candidates
from tests.tiny import llama, lora_parameters, losses, save_random_adapter, save_trained_adapter, trained


bitsandbytes = pytest.importorskip("bitsandbytes")
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base whose matrices are whole blocks of 64 weights, two trained adapters of it and two bad ones."""
    directory = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    llama(**sizes).save_pretrained(directory / "base")
    for seed in range(2):
        save_trained_adapter(directory / f"good-{seed}", seed, model=llama(**sizes))
        save_random_adapter(directory / f"bad-{seed}", seed, scale=3.0, base=llama(**sizes))
    return directory


@pytest.fixture(params=CONFIGS)
def quantized(request, world):
    """Loads the base anew, quantized."""
    settings = {"dtype": torch.float32, "device_map": "cpu"}
    return lambda: LlamaForCausalLM.from_pretrained(
        world / "base", quantization_config=BitsAndBytesConfig(**CONFIGS[request.param]), **settings
    )


def base_state(model):
    """Weights and scales of the quantized layers, as they are in memory."""
    state = {}
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            known = layer.weight.quant_state
            state[name] = (layer.weight.data.clone(), *known.as_dict(packed=True).values())
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
            state[name] = (layer.weight.data.clone(), scales.clone())
    assert len(state) == 14
    return state


def same(ours, theirs):
    pairs = zip([*ours.values()], [*theirs.values()], strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def test_losses_after_the_swap_are_those_of_the_merge_loaded_by_peft(tmp_path, world, quantized):
    callback = MashupCallback(str(world / "good-*"), on_error="raise", guard=False)
    trainer = trained(tmp_path / "out", callback, model=quantized())
    assert callback.report.decision == "merged"
    # The trainer holds such adapters in bfloat16, and what is saved is what it held.
    assert {value.dtype for value in lora_parameters(trainer.model).values()} == {torch.bfloat16}
    merge = PeftModel.from_pretrained(quantized(), tmp_path / "out/mashup", is_trainable=True)
    loaded = trained(tmp_path / "loaded", model=merge)
    assert losses(trainer) == losses(loaded)
    assert losses(trainer)[0] < callback.report.base_loss - 0.1


def test_scratch_leaves_the_base_and_the_training_as_they_are(tmp_path, world, quantized):
    callback = MashupCallback(str(world / "bad-*"), on_error="raise")
    trainer = trained(tmp_path / "out", callback, model=quantized())
    assert callback.report.decision == "scratch", callback.report.reason
    assert callback.report.merged_loss > callback.report.base_loss
    alone = trained(tmp_path / "alone", model=quantized())
    assert losses(trainer) == losses(alone)
    assert same(base_state(trainer.model), base_state(alone.model))
    weights = lora_parameters(alone.model)
    assert all(torch.equal(value, weights[name]) for name, value in lora_parameters(trainer.model).items())


def test_scores_are_the_losses_of_peft_in_training(world, quantized):
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(7, 87, (4, 12), generator=generator)} for _ in range(3)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    paths = [world / name for name in ("good-0", "good-1", "bad-0", "bad-1")]
    model = quantized()
    before = base_state(model)
    scores = {score.candidate.path.name: score.loss for score in score_candidates(model, paths, batches)}
    assert same(base_state(model), before)
    for path in paths:
        reference = PeftModel.from_pretrained(quantized(), path).train()
        with torch.no_grad():
            values = [loss_of(reference(batch["input_ids"]).logits, batch["labels"]) for batch in batches]
        assert scores[path.name] == pytest.approx(sum(values) / len(values), abs=1e-5)


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
