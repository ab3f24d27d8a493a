"""Whether the model computes after the swap what the guard judged, on one held-out batch."""

from dataclasses import dataclass

import torch
from accelerate.state import AcceleratorState
from torch import nn

from .distributed import process_index_and_count
from .guard import Decision
from .model import undisturbed
from .scoring import Metric, RowLosses, SampleRows, evaluate


@dataclass(frozen=True)
class SwapCheck:
    """Losses on one held-out batch: after the swap, what the guard found, and what it found for the fresh start."""

    loss: float
    expected: float
    fresh: float
    # Difference that rounding explains.
    tolerance: float

    @property
    def differs(self) -> bool:
        """Whether the model computes something else than the guard judged."""
        return not abs(self.loss - self.expected) <= self.tolerance

    @property
    def is_worse_than_fresh(self) -> bool:
        """Whether it is also clearly worse than the fresh initialization, and than it should be."""
        return not self.loss <= max(self.expected, self.fresh) + self.tolerance

    def __str__(self) -> str:
        return f"after the swap the loss on one held-out batch is {self.loss:.4f}, expected {self.expected:.4f}"


def check_swap(model: nn.Module, decision: Decision, held_out: SampleRows, metric: Metric) -> SwapCheck:
    """Evaluates the model as it is trained on one held-out batch a process; every process must call it."""
    with undisturbed(model):
        found = evaluate(model, held_out.first(*process_index_and_count()), metric, share=True)
    # The guard may have judged more rows than these, which come first.
    init, seen = decision.init, (found.tokens > 0).nonzero()[:, 0]
    judged = decision.fresh if init is None else init.losses
    loss, expected, fresh = (_mean(losses, seen) for losses in (found, judged, decision.fresh))
    return SwapCheck(loss, expected, fresh, _tolerance(model) * max(1.0, abs(expected)))


def _mean(losses: RowLosses, rows: torch.Tensor) -> float:
    return (losses.loss[rows].sum() / losses.tokens[rows].sum().clamp(min=1)).item()


def _tolerance(model: nn.Module) -> float:
    """1% of the loss in float32, 5% with fewer bits or autocast."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    autocast = AcceleratorState._shared_state.get("_mixed_precision") not in (None, "no")
    return 0.01 if dtypes <= {torch.float32, torch.float64} and not autocast else 0.05
