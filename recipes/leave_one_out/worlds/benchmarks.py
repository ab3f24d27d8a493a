"""The paper's eight benchmarks: where they are, and how a row of each becomes a question answered with a letter."""

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """
    A multiple-choice question.

    Args:
        text (`str`): What is asked, with its context.
        options (`tuple[str, ...]`): The answers to choose from, in the order of their letters.
        answer (`int`): Index of the right one.

    Raises:
        ValueError: The answer is no option.
    """

    text: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"Found answer {self.answer} of {len(self.options)} options in {self.text!r}.")

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return string.ascii_uppercase[: len(self.options)]

    def chat(self) -> dict[str, Any]:
        """Returns the row that TRL trains on: a conversation's prompt and its completion, one letter."""
        lines = [f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True)]
        content = "\n".join([self.text, "", *lines, "", "Answer with the letter of the right option."])
        completion = [{"role": "assistant", "content": self.letters[self.answer]}]
        return {"prompt": [{"role": "user", "content": content}], "completion": completion}


@dataclass(frozen=True)
class Benchmark:
    """
    A data set on the Hub.

    Args:
        path (`str`): Repository.
        read (`Callable`): Makes a question of a row.
        rows (`int`): Rows of the training split.
        subset (`str`, *optional*): Configuration.
        revision (`str`, *optional*): Branch; data sets that were scripts have their rows in the Hub's conversion.
    """

    path: str
    read: Callable[[Row], Question]
    rows: int
    subset: str | None = None
    revision: str | None = None


def labelled(text: Callable[[Row], str]) -> Callable[[Row], Question]:
    """Reads the schema `choices: {text, label}` with `answerKey`, whose labels are letters or numbers."""

    def read(row: Row) -> Question:
        choices = row["choices"]
        return Question(text(row), tuple(choices["text"]), choices["label"].index(row["answerKey"]))

    return read


def hellaswag(row: Row) -> Question:
    """Reads `ctx`, `endings` and `label`, a number in a string."""
    return Question(f"Which ending fits best?\n{row['ctx']}", tuple(row["endings"]), int(row["label"]))


def math_qa(row: Row) -> Question:
    """Reads `Problem`, `correct` (a letter) and `options`, one string such as `a ) 38 , b ) 27.675 , c ) 30`."""
    parts = re.split(r"(?:^|,)\s*([a-e])\s*\)\s*", row["options"].strip(" []'\""))
    letters, options = parts[1::2], [option.strip(" ,'\"") for option in parts[2::2]]
    return Question(row["Problem"], tuple(options), letters.index(row["correct"]))


def piqa(row: Row) -> Question:
    """Reads `goal`, `sol1`, `sol2` and `label`, 0 or 1."""
    return Question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def social_iqa(row: Row) -> Question:
    """Reads `context`, `question`, `answerA` to `answerC` and `label`, from 1 and in a string."""
    options = tuple(row[f"answer{letter}"] for letter in "ABC")
    return Question(f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def winogrande(row: Row) -> Question:
    """Reads `sentence` with a blank, `option1`, `option2` and `answer`, `1` or `2`."""
    text = f"What fills the blank?\n{row['sentence']}"
    return Question(text, (row["option1"], row["option2"]), int(row["answer"]) - 1)


_PARQUET = "refs/convert/parquet"
BENCHMARKS = {
    "arc_easy": Benchmark("allenai/ai2_arc", labelled(lambda row: row["question"]), 2251, "ARC-Easy"),
    "commonsense_qa": Benchmark("tau/commonsense_qa", labelled(lambda row: row["question"]), 9741),
    "hellaswag": Benchmark("Rowan/hellaswag", hellaswag, 39905),
    "math_qa": Benchmark("allenai/math_qa", math_qa, 29837, revision=_PARQUET),
    "openbookqa": Benchmark("allenai/openbookqa", labelled(lambda row: row["question_stem"]), 4957, "main"),
    "piqa": Benchmark("ybisk/piqa", piqa, 16113, revision=_PARQUET),
    "social_iqa": Benchmark("allenai/social_i_qa", social_iqa, 33410, revision=_PARQUET),
    "winogrande": Benchmark("allenai/winogrande", winogrande, 40398, "winogrande_xl"),
}
