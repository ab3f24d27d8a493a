"""The data: the paper's benchmarks, from one row of each one's schema, and the standard library's sources."""

import math

import pytest
import torch

from recipes.leave_one_out.worlds import load_world, sources, stdlib
from recipes.leave_one_out.worlds.benchmarks import BENCHMARKS


PICKED = {"question": "Where?", "choices": {"text": ["bank", "mall"], "label": ["1", "2"]}, "answerKey": "2"}
PROBLEM = {"Problem": "Half of 76 ?", "options": "a ) 38 , b ) 27.675 , c ) rs . 1,200 , d ) none of these"}
SENTENCE = {"sentence": "Ann thanked Bo as _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"}
ROWS = {
    "arc_easy": (PICKED, ("Where?", ["bank", "mall"], "B")),
    "math_qa": (
        {**PROBLEM, "correct": "c"},
        ("Half of 76 ?", ["38", "27.675", "rs . 1,200", "none of these"], "C"),
    ),
    "winogrande": (SENTENCE, ("Ann thanked Bo as _ had helped.", ["Ann", "Bo"], "B")),
}


@pytest.mark.parametrize("name", ROWS)
def test_benchmark_rows_become_questions_answered_with_a_letter(name):
    row, (text, options, letter) = ROWS[name]
    chat = BENCHMARKS[name].read(row).chat()
    assert chat["completion"] == [{"role": "assistant", "content": letter}]
    (message,) = chat["prompt"]
    assert message["role"] == "user"
    assert text in message["content"]
    assert [line for line in message["content"].splitlines() if line[1:3] == ". "] == [
        f"{'ABCDE'[index]}. {option}" for index, option in enumerate(options)
    ]


def test_an_answer_that_is_no_option_is_refused():
    with pytest.raises(ValueError, match="Found answer -1 of 2 options"):
        BENCHMARKS["winogrande"].read({**ROWS["winogrande"][0], "answer": "0"})


def test_functions_to_train_on_and_to_test_on_share_no_docstring():
    train, test = (sources.function_pairs("http", split) for split in ("train", "test"))
    assert train and test
    assert not {text for text, _ in train} & {text for text, _ in test}


def test_sources_of_the_base_and_of_the_packages_are_disjoint():
    base = set(sources.source_files())
    for package in sources.PACKAGES:
        train, unseen = (set(sources.split_files(package, split)) for split in ("train", "test"))
        assert train and unseen
        assert not train & unseen
        assert not base & (train | unseen)


@pytest.mark.parametrize("name", ["stdlib", "smollm2-code"])
def test_a_uniform_model_has_the_nll_per_byte_of_its_vocabulary(name, tmp_path):
    """Every token costs log V: the world's number is that, over bytes a token."""
    world = load_world(name, tmp_path, fast=True)
    tokenizer = world.tokenizer = stdlib.train_tokenizer(sources.source_files("http"))
    model = stdlib.small_llama(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    for split in ("test", "validation") if name == "smollm2-code" else ("test",):
        tokens, size = world.unseen_blocks("asyncio", split)
        # A byte-level token has one character for each byte.
        named = [tokenizer.convert_ids_to_tokens(block[1:]) for block in tokens.tolist()]
        assert size == sum(len(text) for block in named for text in block if text != world.end)
        expected = math.log(len(tokenizer)) * tokens[:, 1:].numel() / size
        assert world.nll(model, "asyncio", split) == pytest.approx(expected, rel=1e-5)
    assert world.evaluate(model, "asyncio") == pytest.approx(world.nll(model, "asyncio", "test"))
    assert world.final(model, "asyncio") in ({}, {"validation": pytest.approx(expected, rel=1e-5)})
