"""The losses of candidates on a sample of the training data."""

from .cache import CacheInfo, ScoreCache
from .evaluation import evaluate
from .halving import COMPARED, FEWEST, affordable_size, doublings, race_rounds, round_sizes, share_of_run, survivors
from .losses import RowLosses, joined, language_model_losses, paired_gain
from .metrics import CallableMetric, LossMetric, Metric, ScoreMetric, TrainerLoss, make_metric
from .race import score_candidates
from .sample import Sample, SampleRows, as_rows, draw_sample, shortened, token_budget
from .score import Score
