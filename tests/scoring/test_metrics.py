"""What a metric measures, and how a candidate is applied meanwhile."""

import contextlib
import math
import statistics

import pytest
import torch
from peft import get_peft_model

from mashup_callback.errors import UsageError
from mashup_callback.lora.source import LoraUpdate
from mashup_callback.scoring import (
    CallableMetric,
    LossMetric,
    RowLosses,
    ScoreMetric,
    TrainerLoss,
    as_rows,
    evaluate,
    make_metric,
    paired_gain,
)
from tests.tiny import llama, lora, sft_trainer


BATCH = {"input_ids": torch.arange(7, 31).view(2, 12), "labels": torch.arange(7, 31).view(2, 12)}


def test_settings_become_metrics():
    assert make_metric("loss") == LossMetric()
    assert make_metric("token_accuracy").name == "token_accuracy"
    score = ScoreMetric(lambda model, batch: 1.0)
    assert make_metric(score) is score and make_metric(score)(None, None) == (-1.0, 1.0)
    assert isinstance(make_metric(lambda model, batch: (1.0, 1)), CallableMetric)
    assert make_metric("loss", trainer=object(), trainee=object()).collective


@pytest.mark.parametrize("count", [-1.0, math.nan])
def test_counts_that_are_no_counts_name_the_contract(count):
    with pytest.raises(UsageError, match="Expected \\(loss summed over the batch, what to divide it by\\)"):
        evaluate(llama(), as_rows([BATCH]), lambda model, batch: (2.0, count))


def test_counts_below_one_are_divided_by_as_they_are():
    values, counts = [0.5, 0.75, 0.1, 0.3], 0.1
    losses, base = (
        RowLosses(loss, loss, torch.full_like(loss, counts))
        for loss in (torch.tensor(values, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    )
    gain, error = paired_gain(losses, base)
    differences = [1 - value for value in values]
    assert gain == pytest.approx(sum(differences) / (4 * counts))
    assert error == pytest.approx(statistics.stdev(differences) * math.sqrt(4) / (4 * counts))


def test_a_trainers_loss_is_that_of_the_trainee_with_the_candidate_written():
    events = []

    class Trainee:
        @contextlib.contextmanager
        def written(self, update):
            events.append(update)
            yield
            events.append("put back")

    class Trainer:
        def __init__(self):
            self.noted = {"entropy": [1.0]}

        def compute_loss(self, model, batch):
            events.append("loss")
            self.noted["entropy"].append(2.0)
            return torch.tensor(0.5)

    trainer, update = Trainer(), LoraUpdate({})
    losses = evaluate(llama(), as_rows([BATCH]), TrainerLoss(trainer, Trainee()), update)
    assert events == [update, "loss", "put back"] and trainer.noted == {"entropy": [1.0]}
    assert losses.loss.item() == 1.0 and losses.tokens.item() == 2 and losses.mean_loss == 0.5


def test_rows_without_a_label_count_nothing_in_a_trainers_loss(tmp_path):
    """Its mean over no labels is not a number, for every candidate."""
    trainer, rows = sft_trainer(tmp_path), as_rows([BATCH, BATCH | {"labels": torch.full((2, 12), -100)}])
    metric = TrainerLoss(trainer, None)
    with torch.no_grad():
        found, alone = (evaluate(trainer.model.eval(), part, metric) for part in (rows, as_rows([BATCH])))
    assert found.tokens.tolist() == [2.0, 0.0] and found.mean_loss == alone.mean_loss > 0


def test_candidates_are_added_to_the_base_except_for_a_trainers_loss():
    model = get_peft_model(llama(), lora(init_lora_weights=False)).eval()
    with torch.no_grad():
        on, base = model(BATCH["input_ids"]).logits, llama().eval()(BATCH["input_ids"]).logits
        for metric, expected in ((LossMetric(), base), (TrainerLoss(None, None), on)):
            with metric.base(model):
                torch.testing.assert_close(model(BATCH["input_ids"]).logits, expected)
    assert not torch.allclose(on, base, atol=1e-3)
