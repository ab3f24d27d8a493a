"""
What scoring an adapter costs, by the bare model's forward pass and by what peft offers; a part of score.py.

16 adapters of rank 16 on all linear layers, 256 tokens with labels at all of them, medians of 5 rounds in which the
ways take turns. The models are random: one of 99 M parameters with the layers of Gemma-3-1B, for the numbers that are
asked for, and for comparison a Llama of 97 M, whose width (768) is smaller and the updates' share of the work larger,
and one of the quickstart's shape.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from mashup_callback import score_candidates


ADAPTERS, RANK, ROWS, LENGTH = 16, 16, 2, 128
# Adapters of a round that go through the slow ways.
FEW = 4
NAMES = ("throughput_vs_bare", "speed_vs_reload", "speed_vs_peft")

console = Console()


def llama(**settings: int) -> LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **settings)).eval()


def gemma() -> Gemma3ForCausalLM:
    """Three layers as Gemma-3-1B has 26, and 16,000 tokens instead of 262,144: 99 M parameters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16_000, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, bos_token_id=None)).eval()


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS = {
    "gemma_1152": gemma,
    "llama_768": partial(llama, **dict(zip(_SIZES, (16_000, 768, 2048, 12, 12), strict=True))),
    "quickstart_128": partial(llama, **dict(zip(_SIZES, (75, 128, 384, 4, 4), strict=True))),
}


def throughput(repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The ratios for every model; those of the first one without its name."""
    found = {}
    for model in MODELS:
        suffix = "" if not found else f"_{model}"
        found |= {name + suffix: value for name, value in _ratios(model, repeats, clock).items()}
    return found


def _ratios(model: str, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        ways = Ways(MODELS[model](), Path(directory), clock)
        # Once for nothing: the first pass allocates, and the files come from the disk.
        ways.bare_for_each(), ways.mashup(), ways.reload(), ways.swap_in_peft()
        rounds = [_round(model, ways) for _ in range(repeats)]
    return dict(zip(NAMES, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def _round(model: str, ways: "Ways") -> list[float]:
    # Before and after, so that a machine that slows down does so for both.
    before, ours, after = ways.bare_for_each(), ways.mashup(), ways.bare_for_each()
    times = {"bare": (before + after) / 2, "reload": ways.reload(), "peft": ways.swap_in_peft()}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in {"mashup": ours, **times}.items())
    console.print(f"{model}: seconds an adapter: {shown}")
    return [value / ours for value in times.values()]


class Ways:
    """The ways to score the same adapters on the same batch; each returns seconds an adapter."""

    def __init__(self, model: nn.Module, directory: Path, clock: Callable[[], float]) -> None:
        self.model, self.clock, self.base = model, clock, directory / "base"
        model.save_pretrained(self.base)
        self.adapters = [directory / str(index) for index in range(ADAPTERS)]
        self._save_random()
        tokens = torch.randint(2, model.config.vocab_size, (ROWS, LENGTH))
        self.batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}

    def _save_random(self) -> None:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
        for path in self.adapters:
            tuned = get_peft_model(self.model, config)
            tuned.save_pretrained(path)
            self.model = tuned.unload()

    def _timed(self, function: Callable[[], object], count: int) -> float:
        started = self.clock()
        function()
        return (self.clock() - started) / count

    def mashup(self) -> float:
        return self._timed(lambda: score_candidates(self.model, self.adapters, [self.batch]), ADAPTERS)

    def bare_for_each(self) -> float:
        return self._timed(lambda: [self._bare(self.model) for _ in self.adapters], ADAPTERS)

    def reload(self) -> float:
        """As the paper's code does it: everything is loaded anew for each adapter, and the model's own loss taken."""
        return self._timed(lambda: [self._reloaded(path) for path in self.adapters[:FEW]], FEW)

    def swap_in_peft(self) -> float:
        """One model, on which adapters are loaded and deleted; the forward pass is the bare one's."""
        tuned = get_peft_model(self.model, LoraConfig(r=RANK, target_modules="all-linear"), "trained").eval()
        taken = self._timed(lambda: [self._swapped(tuned, path) for path in self.adapters[:FEW]], FEW)
        self.model = tuned.unload()
        return taken

    @torch.no_grad()
    def _bare(self, model: nn.Module) -> float:
        """The model's own forward pass, its head at the label positions, and the loss."""
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        hidden = model.model(**inputs, use_cache=False)[0]
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1))
        return F.cross_entropy(logits, self.batch["labels"][:, 1:].flatten(), reduction="sum").item()

    @torch.no_grad()
    def _reloaded(self, path: Path) -> float:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), path).eval()
        return model(**self.batch).loss.item()

    def _swapped(self, tuned: PeftModel, path: Path) -> None:
        tuned.load_adapter(path, "candidate")
        tuned.set_adapter("candidate")
        self._bare(tuned.get_base_model())
        tuned.delete_adapter("candidate")
