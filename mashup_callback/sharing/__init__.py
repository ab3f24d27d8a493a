"""The report and the merge for others."""

from .card import PICTURE_NAME, mashup_card
from .push import push_mashup, share
from .save import save_failure, save_mashup


__all__ = ["PICTURE_NAME", "mashup_card", "push_mashup", "save_failure", "save_mashup", "share"]
