"""The collection: what is done to a good adapter or checkpoint, and the reason with which it must be rejected."""

from . import configs, files, headers, kinds, models, races, values


CASES = [case for module in (configs, headers, values, files, models, kinds, races) for case in module.CASES]
