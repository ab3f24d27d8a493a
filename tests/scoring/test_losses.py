"""Losses against transformers' own, for heads with soft-capping and scaling, without full logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from mashup_callback.scoring import RowLosses, language_model_losses
from mashup_callback.scoring import losses as module
from tests.tiny import llama


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MODELS = {
    "llama": llama,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.1)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=7.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            is_decoder=False,
        )
    ),
    "tagger": lambda: LlamaForTokenClassification(LlamaConfig(**SMALL, num_labels=96)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


def batch(rows=3, length=11, labelled=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 96, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    labels = tokens.masked_fill(torch.rand(rows, length, generator=generator) > labelled, -100).masked_fill(
        mask == 0, -100
    )
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("labelled", [0.3, 1.0])
@torch.no_grad()
def test_equals_the_models_own_loss(name, labelled, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**12 * 5)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    data = batch(labelled=labelled)
    ours = language_model_losses(model, data)
    assert ours.mean_loss == pytest.approx(model(**data).loss.item(), abs=2e-6)
    assert len(ours.loss) == 3
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in data.items()}
        assert ours.loss[row].item() / ours.tokens[row].item() == pytest.approx(model(**alone).loss.item(), abs=5e-6)


@torch.no_grad()
def test_unknown_operation_after_the_head_is_noticed():
    model = llama().eval()
    original = model.forward

    def forward(**inputs):
        outputs = original(**inputs)
        outputs.logits = outputs.logits * 3 + torch.arange(96) / 10
        return outputs

    model.forward = forward
    data = batch()
    labels = F.pad(data["labels"][:, 1:], (0, 1), value=-100)
    logits = forward(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    for _ in range(2):
        assert language_model_losses(model, data).mean_loss == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_device_without_float64_is_enough():
    """As Apple's GPUs are: numbers become float64 only once they are on the CPU."""

    class OnDevice(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.double and not hasattr(args[0], "is_here"):
                raise TypeError("the device has no float64")
            result = function(*args, **(kwargs or {}))
            if function is torch.Tensor.cpu:
                result.is_here = True
            return result

    batch = {"input_ids": torch.arange(7, 31).view(2, 12), "labels": torch.arange(7, 31).view(2, 12)}
    with torch.no_grad(), OnDevice():
        found = language_model_losses(llama(), batch)
    assert found.tokens.tolist() == [11, 11] and found.loss.dtype == torch.float64


def test_full_logits_are_never_built(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**12 * 4)
    model, sizes = llama().eval(), []
    model.lm_head.register_forward_hook(lambda layer, args, output: sizes.append(output.shape[:-1].numel()))
    language_model_losses(model, batch(rows=6, length=12, labelled=1.0))
    assert max(sizes) <= 4
    assert sum(sizes) <= 6 * 12 + 2


@torch.no_grad()
def test_batch_without_label_tokens():
    data = batch()
    data["labels"].fill_(-100)
    losses = language_model_losses(llama().eval(), data)
    assert losses.loss.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no row has a label other than -100"):
        losses.mean_loss  # noqa: B018


@pytest.mark.parametrize(("count", "mean"), [(0.5, 4.0), (0.25, 8.0), (3.0, 2 / 3)])
def test_counts_of_a_metric_are_taken_as_they_are(count, mean):
    loss, counts = (torch.tensor([value], dtype=torch.float64) for value in (2.0, count))
    assert RowLosses(loss, loss, counts).mean_loss == pytest.approx(mean)


@pytest.mark.parametrize("count", [0.0, -1.0, float("nan")])
def test_counts_that_are_no_counts_are_an_error(count):
    loss, counts = (torch.tensor([value], dtype=torch.float64) for value in (2.0, count))
    with pytest.raises(ValueError, match="expected more than 0"):
        RowLosses(loss, loss, counts).mean_loss  # noqa: B018


@torch.no_grad()
def test_custom_model_without_a_known_head():
    class Custom(torch.nn.Module):
        config = llama().config

        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, data = Custom().eval(), batch()
    expected = model.inner(**data).loss.item()
    assert language_model_losses(model, data).mean_loss == pytest.approx(expected, abs=2e-6)
