"""A real language model on BIG-bench tasks with lettered options: SmolLM2-135M-Instruct and the package bigbench."""

import json
import random
import tarfile
from collections import Counter
from functools import cache
from pathlib import Path

from datasets import Dataset
from torch import nn

from . import smollm2
from .base import Budget, evaluating
from .benchmarks import Question, letter_scores


PACKAGE = "bigbench==1.0.0"
# Rows are short here. The two of multiemo ask the same of texts in two languages.
SOURCES = {
    "intent": "intent_recognition",
    "epistemic": "epistemic_reasoning",
    "vitaminc": "vitaminc_fact_verification",
    "hyperbaton": "hyperbaton",
    "hotels": "multiemo/hotels_sentence_en",
    "fallacy": "logical_fallacy_detection",
    "navigate": "navigate",
    "sports": "sports_understanding",
    "medicine": "multiemo/medicine_sentence_es",
}
FORMAT = "format-"
MOST_ROWS, LONGEST, LENGTH, BATCH_SIZE, EVAL_BATCH_SIZE = 4_000, 500, 640, 8, 16
ARMS = ("scratch", "mashup", "best_single", "format", "all")
TASKS, RATES, SEEDS = tuple(SOURCES), (5e-4, 1e-3, 2e-3), (1, 2)
FULL = Budget(TASKS, 160, eval_every=40, learning_rate=1e-3, seeds=SEEDS, arms=ARMS, learning_rates=RATES, tuned=ARMS)
FAST = Budget(("hotels",), 8, eval_every=4, learning_rate=1e-3, seeds=(1,), arms=("scratch", "mashup", "format"))
FAST_TASKS = ("hotels", "intent", "medicine")
TEST_ROWS, TEST_ROWS_FAST = 128, 32


class SmolLM2BigBench(smollm2.SmolLM2):
    """Questions answered by letter; the metric is the NLL of the right letter among the options' letters."""

    name = "smollm2_bigbench"
    metric = "NLL of the letter (nats)"
    batch_size, length = BATCH_SIZE, LENGTH

    def controls(self) -> tuple[str, ...]:
        return tuple(FORMAT + task for task in self.budget.tasks if "format" in self.budget.arms)

    def prepare(self) -> None:
        super().prepare()
        extract_tasks()

    def asked(self, task: str, split: str) -> list[Question]:
        """The questions of a split; for the control `format`, those of all other tasks with answers drawn by lot."""
        if not task.startswith(FORMAT):
            return split_questions(read_questions(task), split, self.test_rows)
        others = [name for name in self.names if name != task.removeprefix(FORMAT)]
        return without_skill([question for name in others for question in self.asked(name, "train")])

    def train_rows(self, target, seed, steps):
        drawn = random.Random(seed).choices(self.asked(target, "train"), k=steps * BATCH_SIZE)
        return Dataset.from_list([row(question) for question in drawn])

    def evaluate(self, model, target):
        return self.measured(model, target, "test")[0]

    def final(self, model, target):
        return {
            "validation": self.measured(model, target, "validation")[0],
            "accuracy": self.measured(model, target, "test")[1],
            "chance": chance(self.asked(target, "train")),
            "rows": len(self.asked(target, "test")),
        }

    def measured(self, model: nn.Module, task: str, split: str) -> tuple[float, float]:
        """NLL of the right letter among the options' letters, and accuracy, means over the rows of a split."""
        asked = self.asked(task.removeprefix(FORMAT), split)
        found = []
        with evaluating(model):
            for start in range(0, len(asked), EVAL_BATCH_SIZE):
                part = asked[start : start + EVAL_BATCH_SIZE]
                found += letter_scores(model, self.tokenizer, part, [row(q)["prompt"] for q in part], before=" ")
        nll, right = zip(*found, strict=True)
        return sum(nll) / len(nll), sum(right) / len(right)


def extract_tasks() -> None:
    """Writes the tasks' files from the package, a source archive that is not installed, into the cache."""
    directory = smollm2.cache() / "bigbench"
    wanted = {f"benchmark_tasks/{source}/task.json": file_of(task) for task, source in SOURCES.items()}
    if all(path.is_file() for path in wanted.values()):
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(smollm2.download(PACKAGE)) as archive:
        for member in archive:
            for suffix, path in wanted.items():
                if member.name.endswith(suffix):
                    path.write_bytes(archive.extractfile(member).read())


def file_of(task: str) -> Path:
    """Where a task's file is."""
    return smollm2.cache() / "bigbench" / f"{task}.json"


@cache
def read_questions(task: str) -> list[Question]:
    """Reads a task's file."""
    return make_questions(json.loads(file_of(task).read_text(encoding="utf-8"))["examples"], task)


def make_questions(examples: list[dict], task: str) -> list[Question]:
    """
    Makes questions of at most `MOST_ROWS` examples, in a fixed random order, each text once. The options are in
    alphabetical order, so that a task's classes have the same letters in all its questions: a model of this size does
    not learn within so few steps to look up which letter stands for a class.
    """
    drawn = random.Random(task)
    questions = {}
    for example in drawn.sample(examples, len(examples)):
        options = sorted(example["target_scores"].items())
        text = example["input"].strip()
        if len(text) + sum(len(option) for option, _ in options) <= LONGEST:
            best = max(range(len(options)), key=lambda index: options[index][1])
            questions.setdefault(text, Question(text, tuple(option.strip() for option, _ in options), best))
    return list(questions.values())[:MOST_ROWS]


def split_questions(questions: list[Question], split: str, test_rows: int) -> list[Question]:
    """Returns a split's rows: the first ones for the test, half as many for validation, the others to train on."""
    first, second = test_rows, test_rows + test_rows // 2
    parts = {"test": questions[:first], "validation": questions[first:second], "train": questions[second:]}
    return parts[split]


def without_skill(questions: list[Question], seed: int = 0) -> list[Question]:
    """The same questions with answers drawn by lot: they teach the form of an answer and nothing else."""
    drawn = random.Random(seed)
    return [Question(q.text, q.options, drawn.randrange(len(q.options))) for q in questions]


def chance(questions: list[Question]) -> float:
    """The accuracy without reading the question: by lot, or with the commonest answer where it is the better guess."""
    common = Counter(question.options[question.answer] for question in questions).most_common(1)[0][1]
    return max(common, sum(1 / len(question.options) for question in questions)) / len(questions)


def row(question: Question) -> dict[str, str]:
    """Returns the row that TRL trains on, without a chat template, which would be longer than many questions."""
    prompt = "\n".join([question.text, *question.lines, "Answer:"])
    return {"prompt": prompt, "completion": f" {question.letters[question.answer]}"}


def make(home: Path, fast: bool, model: str | None) -> SmolLM2BigBench:
    sizes = (FAST, FAST_TASKS, TEST_ROWS_FAST) if fast else (FULL, tuple(SOURCES), TEST_ROWS)
    return SmolLM2BigBench(home, *sizes, model)
