"""What a client of the loopback Hub runs, and what is read of its answer."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BROKEN = "truncated, padded or no safetensors"
CARD = "---\nbase_model: {base}\nlibrary_name: peft\nlicense: {license}\ntags: [{tag}]\n---\n# An adapter\n"

PRELUDE = """
import json, logging, os, sys, time
from pathlib import Path
from mashup_callback.formats.adapter import load_factors, read_adapter
from mashup_callback.formats.base import BaseModel
from mashup_callback.candidates import Hub, arriving, find_candidates, hub as hub_module

LAYERS = {"layers.0.q_proj": (4, 3)}
fits = BaseModel(LAYERS, name="acme/base").check

def find(specs, base="acme/base", fetch=False, connection=None, check=None, **limits):
    connection, check = connection or Hub(), check or BaseModel(LAYERS, name=base).check
    found = find_candidates(specs, base, check=check, hub=connection, **limits)
    if fetch:
        with arriving(found, connection) as coming:
            found = list(coming)
    rows = {}
    for item in found:
        path = None if item.path is None else str(item.path)
        rows[item.name] = {"revision": item.revision, "reason": item.reason, "path": path, "bytes": item.bytes,
                           "license": item.license, "datasets": item.datasets, "run": item.run, "kind": item.kind}
    return rows

def value(path):
    return load_factors(read_adapter(path))["layers.0.q_proj"].A[0, 0].item()

def finish(**results):
    print(json.dumps(results))
"""


def usable(rows):
    return [name for name, row in rows.items() if row["reason"] is None]


def reasons(rows):
    return {name: row["reason"] for name, row in rows.items() if row["reason"]}


def whole_files(hub):
    """Repositories of which files were downloaded as a whole, not by a range."""
    return {request.repo_id for request in hub.requests if request.is_download and request.range is None}
