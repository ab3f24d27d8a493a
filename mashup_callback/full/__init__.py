"""All weights of a model are trained."""

from .sources import CheckpointSource
from .trainee import FullTrainee
from .weights import FullUpdate, find_trained_weights


__all__ = ["CheckpointSource", "FullTrainee", "FullUpdate", "find_trained_weights"]
