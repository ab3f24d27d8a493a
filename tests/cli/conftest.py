import pytest
from datasets import DatasetDict

from tests import tiny
from tests.hub.conftest import hub, run_client  # noqa: F401


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, three adapters of it, one of another model, and the same rows in several forms."""
    directory = tmp_path_factory.mktemp("world")
    tiny.llama().save_pretrained(directory / "base")
    tiny.tokenizer().save_pretrained(directory / "base")
    for seed in range(3):
        tiny.save_random_adapter(directory / f"runs/a{seed}", seed, scale=0.05 * seed)
    tiny.save_random_adapter(directory / "other", 0, base=tiny.llama(hidden_size=64))
    tiny.rows("text", 12).to_json(directory / "text.jsonl")
    tiny.rows("chat", 12).to_parquet(directory / "chat.parquet")
    tiny.rows("prompt_completion", 12).save_to_disk(directory / "pairs")
    (directory / "empty.jsonl").touch()
    (directory / "odd.jsonl").write_text('{"question": "w1"}\n')
    DatasetDict(train=tiny.rows("text", 2)).save_to_disk(directory / "splits")
    return directory
