"""The losses of candidates on a sample of the training data."""

from .budget import FEWEST, affordable_size, share_of_run, shortened
from .cache import CacheInfo, ScoreCache
from .evaluation import evaluate
from .halving import race_rounds, round_sizes, survivors
from .losses import RowLosses, joined, language_model_losses, paired_gain
from .metrics import CallableMetric, LossMetric, Metric, ScoreMetric, TrainerLoss, make_metric
from .race import score_candidates
from .sample import Sample, SampleRows, as_rows, draw_sample, token_budget
from .score import Score


__all__ = [
    "FEWEST",
    "CacheInfo",
    "CallableMetric",
    "LossMetric",
    "Metric",
    "RowLosses",
    "Sample",
    "SampleRows",
    "Score",
    "ScoreCache",
    "ScoreMetric",
    "TrainerLoss",
    "affordable_size",
    "as_rows",
    "draw_sample",
    "evaluate",
    "joined",
    "language_model_losses",
    "make_metric",
    "paired_gain",
    "race_rounds",
    "round_sizes",
    "score_candidates",
    "share_of_run",
    "shortened",
    "survivors",
    "token_budget",
]
