"""Leave one out: trains every task from scratch, from a mashup of the other tasks' adapters, and from controls.

    python recipes/leave_one_out/run.py --world quickstart --fast      # minutes, offline, CPU
    python recipes/leave_one_out/run.py --world quickstart
    python recipes/leave_one_out/run.py --world quickstart --full      # all weights, from full checkpoints
    python recipes/leave_one_out/run.py --world paper --model google/gemma-3-1b-pt --ray

An interrupted run continues where it stopped: start it again with the same arguments.
"""

import sys
from pathlib import Path


# The recipe is a namespace package of the repository, for this process and for the workers it starts.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.leave_one_out.cli import main


if __name__ == "__main__":
    main(__doc__)
