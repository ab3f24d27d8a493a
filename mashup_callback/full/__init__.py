"""All weights of a model are trained."""

from .trainee import FullTrainee
from .weights import CheckpointSource, FullUpdate, find_trained_weights
