"""Writing a live model as a checkpoint on disk, a shard at a time, whatever the launch mode."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from safetensors.torch import save_file
from torch import nn

from ..distributed import is_main_process
from ..errors import CheckpointError
from ..formats import INDEX_NAME, MODEL_WEIGHTS_NAME, BaseModel, read_checkpoint, read_tensor
from ..model import ModelTensors, read_parameters, stream_parameters, unwrapped


MAX_SHARD_BYTES = 2_000_000_000


def save_model(model: nn.Module, tensors: ModelTensors, directory: Path) -> Path:
    """Writes a model's configuration and weights; every process must call it, as a shard is gathered at a time."""
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        values = read_parameters(model, names)
        file = MODEL_WEIGHTS_NAME if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            contents = {name: value.cpu().contiguous() for name, value in values.items()}
            save_file(contents, directory / file, metadata={"format": "pt"})
    if is_main_process():
        _save_config(model, tensors, directory)
        if len(shards) > 1:
            listing = {"metadata": {"total_size": tensors.bytes}, "weight_map": weight_map}
            (directory / INDEX_NAME).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
    return directory


def is_model_on_disk(model: nn.Module, base: BaseModel, directory: Path) -> bool:
    """Whether a directory holds exactly the model's weights, in its precision; every process must call it."""
    try:
        checkpoint = read_checkpoint(directory).fit(base)
    except CheckpointError:
        return False
    same = True
    for name, value in stream_parameters(model, base.tensors.shapes):
        same = same and bool((read_tensor(checkpoint, name).to(value) == value).all())
    return same


def _shards(tensors: ModelTensors) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in tensors.shapes:
        count = tensors.bytes_of(name)
        if shard and size + count > MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += count
    yield shard


def _save_config(model: nn.Module, tensors: ModelTensors, directory: Path) -> None:
    model = unwrapped(extract_model_from_parallel(model))
    config = copy.deepcopy(model.config)
    # FSDP2 gives the model's class another name.
    config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
    config.dtype = tensors.dtype
    config.save_pretrained(directory)
