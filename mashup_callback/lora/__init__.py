"""A LoRA adapter is trained."""

from .hooks import applied, structure_kept
from .merge import MergedAdapter, merge_adapters, merge_factors
from .source import AdapterSource, LoraUpdate
from .targets import TrainedAdapter, find_adapter
from .trainee import LoraTrainee, fit
from .writer import save_adapter


__all__ = [
    "AdapterSource",
    "LoraTrainee",
    "LoraUpdate",
    "MergedAdapter",
    "TrainedAdapter",
    "applied",
    "find_adapter",
    "fit",
    "merge_adapters",
    "merge_factors",
    "save_adapter",
    "structure_kept",
]
