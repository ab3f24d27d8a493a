"""
Peak memory while full checkpoints are scored, against the bound that `FullUpdate.applied` states.

    python recipes/benchmarks/full_memory.py --candidates 8 --hidden 768 --layers 12 --vocabulary 20000

Prints one line of JSON. Bytes are those of this process alone; mapped shards are given apart.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mashup_callback import score_candidates
from recipes.benchmarks.memory import Peak, resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("candidates", 8), ("hidden", 768), ("layers", 12), ("vocabulary", 20000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "vocab_size": options.vocabulary}
    layers = {"num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **layers))
    tokens = torch.randint(0, options.vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": tokens, "labels": tokens}]
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / str(index) for index in range(options.candidates)]
        model.save_pretrained(paths[0], max_shard_size="100MB")
        for path in paths[1:]:
            path.symlink_to(paths[0])
        # The first forward pass allocates buffers that have nothing to do with candidates.
        score_candidates(model, [], batches)
        with torch.no_grad():
            model(**batches[0])
        with Peak() as peak:
            scores = score_candidates(model, paths, batches)
        left = resident()["own"] - peak.first["own"]
    assert all(score.status == "scored" for score in scores), scores[0].reason
    tensors = [value.nbytes for value in model.parameters()]
    found = {
        "parameters": sum(value.numel() for value in model.parameters()),
        "candidates": options.candidates,
        "model_bytes": sum(tensors),
        "largest_tensor_bytes": max(tensors),
        "bound_bytes": sum(tensors) + max(tensors),
        "peak_extra_bytes": peak.added("own"),
        "peak_extra_mapped_bytes": peak.added("mapped"),
        "left_bytes": left,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
