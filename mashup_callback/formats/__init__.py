"""Files that strangers wrote, read safely: LoRA adapters and full checkpoints."""

from .adapter import WEIGHTS_NAME, Adapter, adapter_hash, load_factors, parse_adapter, read_adapter, read_weights
from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from .adapter_modules import ModuleShape
from .adapter_writer import write_adapter, write_tensors
from .base import BaseModel, Description
from .checkpoint import (
    INDEX_NAME,
    MAX_JSON_BYTES,
    MODEL_CONFIG_NAME,
    MODEL_WEIGHTS_NAME,
    Checkpoint,
    check_unchanged,
    describe_checkpoint,
    is_checkpoint,
    parse_index,
    read_checkpoint,
    read_tensor,
    shard_names,
)
from .files import open_regular, parse_object, quote, read_limited
from .header import FileStamp, TensorInfo, header_end, parse_header
