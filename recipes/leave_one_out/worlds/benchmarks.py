"""Questions that are answered with a letter, and the paper's eight benchmarks with how their rows are read."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right option."""

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

    @property
    def lines(self) -> list[str]:
        """The options, each behind its letter."""
        return [f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True)]

    def chat(self) -> dict[str, Any]:
        """Returns the row that TRL trains on: a conversation's prompt and its completion, one letter."""
        content = "\n".join([self.text, "", *self.lines, "", "Answer with the letter of the right option."])
        completion = [{"role": "assistant", "content": self.letters[self.answer]}]
        return {"prompt": [{"role": "user", "content": content}], "completion": completion}


def letter_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    prompts: Sequence[str],
    before: str = "",
    **settings: bool,
) -> list[tuple[float, bool]]:
    """Returns the NLL of each question's right letter among those of its options, and whether it is the likeliest."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", **settings)
    mask = batch["attention_mask"].to(next(model.parameters()).device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = batch["input_ids"].to(mask.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
    found = []
    for values, question in zip(logits.float(), asked, strict=True):
        tokens = [tokenizer.encode(before + letter, add_special_tokens=False)[-1] for letter in question.letters]
        scores = values[tokens].log_softmax(-1)
        found.append((-scores[question.answer].item(), scores.argmax().item() == question.answer))
    return found


@dataclass(frozen=True)
class Benchmark:
    """A data set on the Hub, the rows of its training split, and how a row becomes a question."""

    path: str
    read: Callable[[Row], Question]
    rows: int
    subset: str | None = None
    # Data sets that were scripts have their rows in the Hub's conversion, a branch.
    revision: str | None = None


def labelled(text: str) -> Callable[[Row], Question]:
    """Reads the schema `choices: {text, label}` with `answerKey`, whose labels are letters or numbers."""

    def read(row: Row) -> Question:
        choices = row["choices"]
        return Question(row[text], tuple(choices["text"]), choices["label"].index(row["answerKey"]))

    return read


def hellaswag(row: Row) -> Question:
    return Question(f"Which ending fits best?\n{row['ctx']}", tuple(row["endings"]), int(row["label"]))


def math_qa(row: Row) -> Question:
    """`options` is one string such as `a ) 38 , b ) 27.675 , c ) 30`."""
    parts = re.split(r"(?:^|,)\s*([a-e])\s*\)\s*", row["options"].strip(" []'\""))
    letters, options = parts[1::2], [option.strip(" ,'\"") for option in parts[2::2]]
    return Question(row["Problem"], tuple(options), letters.index(row["correct"]))


def piqa(row: Row) -> Question:
    return Question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def social_iqa(row: Row) -> Question:
    options = tuple(row[f"answer{letter}"] for letter in "ABC")
    return Question(f"{row['context']} {row['question']}", options, int(row["label"]) - 1)


def winogrande(row: Row) -> Question:
    text = f"What fills the blank?\n{row['sentence']}"
    return Question(text, (row["option1"], row["option2"]), int(row["answer"]) - 1)


_PARQUET = "refs/convert/parquet"
BENCHMARKS = {
    "arc_easy": Benchmark("allenai/ai2_arc", labelled("question"), 2251, "ARC-Easy"),
    "commonsense_qa": Benchmark("tau/commonsense_qa", labelled("question"), 9741),
    "hellaswag": Benchmark("Rowan/hellaswag", hellaswag, 39905),
    "math_qa": Benchmark("allenai/math_qa", math_qa, 29837, revision=_PARQUET),
    "openbookqa": Benchmark("allenai/openbookqa", labelled("question_stem"), 4957, "main"),
    "piqa": Benchmark("ybisk/piqa", piqa, 16113, revision=_PARQUET),
    "social_iqa": Benchmark("allenai/social_i_qa", social_iqa, 33410, revision=_PARQUET),
    "winogrande": Benchmark("allenai/winogrande", winogrande, 40398, "winogrande_xl"),
}
