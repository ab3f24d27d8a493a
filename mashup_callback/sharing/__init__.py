"""The report and the merge for others."""

from .card import mashup_card
from .push import push_mashup, share
from .save import PLOT_NAME, save_failure, save_mashup


__all__ = ["PLOT_NAME", "mashup_card", "push_mashup", "save_failure", "save_mashup", "share"]
