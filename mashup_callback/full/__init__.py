"""All weights of a model are trained."""

from .trainee import FullTrainee
from .weights import FullUpdate, find_trained_weights


__all__ = ["FullTrainee", "FullUpdate", "find_trained_weights"]
