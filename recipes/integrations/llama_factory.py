"""LLaMA-Factory: `python llama_factory.py sft.yaml "saves/*"` instead of `llamafactory-cli train sft.yaml`."""

import sys

from llamafactory.train.tuner import run_exp

from mashup_callback import MashupCallback


if __name__ == "__main__":
    # LLaMA-Factory reads the command line itself: what is left there is its own file and settings.
    candidates = sys.argv.pop(2)
    run_exp(callbacks=[MashupCallback(candidates)])
