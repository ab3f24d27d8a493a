"""What can be wrong with a checkpoint: what is done to a good one, and what the reason must say."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.tiny import llama


def other_architecture(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))


def other_width(directory):
    llama(hidden_size=48, num_attention_heads=4).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_depth(directory):
    llama(num_hidden_layers=1).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_tying(directory):
    llama(tie_word_embeddings=True).save_pretrained(directory)
    (directory / "model.safetensors.index.json").unlink()


def other_vocabulary(directory):
    llama(vocab_size=120).save_pretrained(directory)
    for name in ("model.safetensors.index.json", "tokenizer.json"):
        (directory / name).unlink()


def resized(directory, rows):
    model = LlamaForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(directory)


def longer_vocabulary(directory):
    resized(directory, 104)


def shorter_vocabulary(directory):
    resized(directory, 90)


def truncated_shard(directory):
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(directory):
    sorted(directory.glob("*.safetensors"))[-1].unlink()


def missing_tensor(directory):
    shard = sorted(directory.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def index_of_absent_files(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-99999-of-00006.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_elsewhere(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model-00001-of-00006.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def not_finite(directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, shard)


def pickled(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


def quantized(directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    save_file({name: value.to(torch.int8) for name, value in load_file(shard).items()}, shard)


BAD = {
    other_architecture: "another architecture: model_type is mistral, expected llama",
    other_width: "another architecture: .* has shape",
    other_depth: "another architecture: tensor model.layers.1.* is missing",
    other_tying: "its head is tied to its embeddings, and the model's is not",
    other_vocabulary: r"another vocabulary: .* has shape \(120, 32\), expected \(96, 32\)",
    longer_vocabulary: r"another vocabulary: .* has shape \(104, 32\), expected \(96, 32\)",
    shorter_vocabulary: r"another vocabulary: .* has shape \(90, 32\), expected \(96, 32\)",
    truncated_shard: "model-0000.-of-0000..safetensors: .* truncated",
    missing_shard: "model-0000.-of-0000..safetensors, which model.safetensors.index.json names is missing",
    missing_tensor: "says that .* and it is not there",
    index_of_absent_files: "model-99999-of-00006.safetensors, which .* names is missing",
    index_that_leads_elsewhere: "names the file .*, expected a",
    not_finite: "not finite",
    pickled: "pickled weights, which are never opened",
    quantized: "dtype I8, expected one of",
}
