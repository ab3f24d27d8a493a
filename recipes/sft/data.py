"""Writes the data that the recipes name: `data/<task>/train.jsonl` and `test.jsonl`, rows with prompt and completion.

python recipes/sft/data.py smallest           # a task of the quickstart: generated, offline
python recipes/sft/data.py arc_easy piqa      # benchmarks of the paper: from the Hub
"""

import argparse
from pathlib import Path

from datasets import Dataset

from recipes.leave_one_out.worlds.benchmarks import BENCHMARKS
from recipes.leave_one_out.worlds.paper import questions
from recipes.quickstart import world


SPLITS = {"train": "train", "test": "validation"}


def rows(task: str, split: str) -> Dataset:
    """The rows of a task: letters for answers, as a conversation where the task is a benchmark."""
    if task in world.TASKS:
        return world.rows(task, world.TRAIN_ROWS if split == "train" else world.TEST_ROWS, 1, split)
    return Dataset.from_list([question.chat() for question in questions(task, SPLITS[split])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=[*world.TASKS, *BENCHMARKS], metavar="task")
    parser.add_argument("--output-dir", type=Path, default=Path("data"))
    options = parser.parse_args(arguments)
    for task in options.tasks:
        for split in SPLITS:
            path = options.output_dir / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows(task, split).to_json(path)
            print(path)


if __name__ == "__main__":
    main()
