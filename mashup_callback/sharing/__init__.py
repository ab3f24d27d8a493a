"""The report and the merge for others."""

from .card import PICTURE_NAME
from .push import push_mashup, share
from .save import save_failure, save_mashup
