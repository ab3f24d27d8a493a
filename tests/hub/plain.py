"""The files of an adapter, and plain HTTP, which checks what the client leaves out."""

import http.client
import urllib.error
import urllib.request

import numpy
from safetensors.numpy import save


CARD = b"---\nbase_model: acme/base\nlibrary_name: peft\nlicense: mit\ntags: [code]\n---\n# An adapter\n"
CONFIG = b'{"peft_type": "LORA", "r": 2}'
WEIGHTS = save({"lora_A.weight": numpy.arange(12, dtype=numpy.float32).reshape(2, 6)})
ADAPTER = {"README.md": CARD, "adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


def get(url: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers of a plain GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers
