"""
Peak memory while full checkpoints are scored, against the bound that `mashup_callback.full.weights.replaced` states.

    python recipes/benchmarks/full_memory.py --candidates 8 --hidden 768 --layers 12 --vocabulary 20000

Prints one line of JSON. Bytes are those of this process alone (RssAnon); mapped shards (RssFile) are given apart.
"""

import argparse
import json
import tempfile
import threading
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mashup_callback import score_candidates


class Peak:
    """Samples this process's memory in a thread and keeps the largest values."""

    def __enter__(self) -> "Peak":
        self.done = threading.Event()
        self.first = self.last = self.memory()
        self.largest = dict(self.first)
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self.last = self.memory()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            found = self.memory()
            self.largest = {name: max(value, found[name]) for name, value in self.largest.items()}

    @staticmethod
    def memory() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

    def extra(self, name: str) -> int:
        return self.largest[name] - self.first[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=20000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            vocab_size=options.vocabulary,
        )
    )
    tokens = torch.randint(0, options.vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": tokens, "labels": tokens}]
    sizes = [value.nbytes for value in model.parameters()]
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
    assert all(score.status == "scored" for score in scores), scores[0].reason
    print(
        json.dumps(
            {
                "parameters": sum(value.numel() for value in model.parameters()),
                "candidates": options.candidates,
                "model_bytes": sum(sizes),
                "largest_tensor_bytes": max(sizes),
                "bound_bytes": sum(sizes) + max(sizes),
                "peak_extra_bytes": peak.extra("RssAnon"),
                "peak_extra_mapped_bytes": peak.extra("RssFile"),
                "left_bytes": peak.last["RssAnon"] - peak.first["RssAnon"],
            }
        )
    )


if __name__ == "__main__":
    main()
