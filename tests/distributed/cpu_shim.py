"""
Lets processes on a CPU take the way that processes on several GPUs take.

accelerate honours the FSDP and DeepSpeed plugins for accelerators only. Import this before anything makes a
`PartialState`; the processes then talk over gloo and count as an accelerator's.
"""

import os


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import transformers.training_args
from accelerate.state import PartialState
from accelerate.utils import DistributedType


PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
# bf16=True is refused on a CPU unless use_cpu is set, and use_cpu switches the plugins off.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
