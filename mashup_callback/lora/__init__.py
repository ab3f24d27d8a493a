"""A LoRA adapter is trained."""

from .fitting import fit
from .hooks import applied, note_bypassed, structure_kept
from .merge import MergedAdapter, merge_adapters, merge_factors
from .source import AdapterSource, LoraUpdate
from .targets import TrainedAdapter, find_adapter
from .trainee import LoraTrainee
from .writer import save_adapter
