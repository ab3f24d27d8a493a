"""What can be wrong with a checkpoint: what is done to a good one, and what the reason must say."""

from math import nan

import torch
from transformers import LlamaForCausalLM

from tests.hostile.cases.models import shard_of
from tests.hostile.damage import INDEX, MODEL_CONFIG, changed, fields, gone, mapped, tensors
from tests.tiny import llama


def saved(**settings):
    """Another model in its place."""

    def change(directory):
        llama(**settings).save_pretrained(directory)
        for name in (INDEX, "tokenizer.json"):
            (directory / name).unlink()

    return change


def resized(rows):
    def change(directory):
        model = LlamaForCausalLM.from_pretrained(directory)
        model.resize_token_embeddings(rows, mean_resizing=False)
        without_weights(directory)
        model.save_pretrained(directory)

    return change


def without_weights(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def pickled(directory):
    without_weights(directory)
    torch.save({}, directory / "pytorch_model.bin")


def of_shard(position, change):
    """Changes one of the shards, by its name."""
    return lambda directory: change(sorted(directory.glob("*.safetensors"))[position].name)(directory)


EMBED = "model.embed_tokens.weight has shape"
BAD = {
    "other_architecture": (
        fields(MODEL_CONFIG, model_type="mistral"),
        "another architecture: model_type is mistral, expected llama",
    ),
    "other_width": (
        saved(hidden_size=48, num_attention_heads=4),
        rf"another architecture: {EMBED} \(96, 48\), expected \(96, 32\)",
    ),
    "other_depth": (saved(num_hidden_layers=1), "another architecture: tensor model.layers.1.* is missing"),
    "other_tying": (saved(tie_word_embeddings=True), "its head is tied to its embeddings, and the model's is not"),
    "other_vocabulary": (saved(vocab_size=120), rf"another vocabulary: {EMBED} \(120, 32\), expected \(96, 32\)"),
    "longer_vocabulary": (resized(104), r"another vocabulary: .* has shape \(104, 32\), expected \(96, 32\)"),
    "shorter_vocabulary": (resized(90), r"another vocabulary: .* has shape \(90, 32\), expected \(96, 32\)"),
    "truncated_shard": (
        of_shard(-1, lambda name: changed(name, lambda data: data[:-100])),
        "model-0000.-of-0000..safetensors: .* truncated, padded",
    ),
    "missing_shard": (
        of_shard(-1, gone),
        "model-0000.-of-0000..safetensors, which model.safetensors.index.json names is missing",
    ),
    "missing_tensor": (
        of_shard(-1, lambda name: tensors(lambda found: found.pop(min(found)), name)),
        "says that .* and it is not there",
    ),
    "index_of_absent_files": (
        shard_of("model-99999-of-00006.safetensors"),
        "model-99999-of-00006.safetensors, which .* names is missing",
    ),
    "index_that_leads_elsewhere": (
        shard_of("../../elsewhere.safetensors"),
        "names the file ../../elsewhere.safetensors, expected a",
    ),
    "not_finite": (
        of_shard(0, lambda name: tensors(lambda found: next(iter(found.values())).view(-1)[3].fill_(nan), name)),
        "not finite",
    ),
    "pickled": (pickled, "it has only pickled weights, which are never opened, and no model.safetensors"),
    "quantized": (of_shard(0, lambda name: mapped(lambda v: v.to(torch.int8), name)), "dtype I8, expected one of"),
}
