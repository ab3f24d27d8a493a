"""Leave one out: trains every task from scratch, from a mashup of the other tasks' adapters, and from controls.

    python recipes/leave_one_out/run.py --world quickstart --fast      # minutes, offline, CPU
    python recipes/leave_one_out/run.py --world quickstart
    python recipes/leave_one_out/run.py --world quickstart --full      # all weights, from full checkpoints
    python recipes/leave_one_out/run.py --world paper --model google/gemma-3-1b-pt --ray

An interrupted run continues where it stopped: start it again with the same arguments.
"""

from recipes.leave_one_out.cli import main


if __name__ == "__main__":
    main(__doc__)
