"""
One process of a launch, started by torchrun: `python -m tests.distributed.worker <launch as JSON>`.

It trains one case after the other and writes `rank<n>.json` into the directory of each. A case that fails ends the
process: the others of its launch may wait in an exchange.
"""

import json
import sys


LAUNCH = json.loads(sys.argv[1])
if LAUNCH["shim"]:
    from tests.distributed import cpu_shim  # noqa: F401

import faulthandler
import os
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from tests.distributed.modes import prepare
from tests.distributed.training import train


RANK, WORLD = int(os.environ.get("RANK", 0)), LAUNCH["world"]
# Seconds after which a case hangs.
LIMIT = 120


def main():
    prepare(LAUNCH["mode"], WORLD)
    for case in LAUNCH["cases"]:
        if dist.is_initialized():
            dist.barrier()
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        started = time.monotonic()
        findings = train(**case, mode=LAUNCH["mode"], world=WORLD, rank=RANK)
        findings["seconds"] = time.monotonic() - started
        (Path(case["directory"]) / f"rank{RANK}.json").write_text(json.dumps(findings))
        faulthandler.cancel_dump_traceback_later()


def leave(code):
    # gloo's threads now and then keep a process from ending while its DDP model is destroyed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        leave(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(0)
