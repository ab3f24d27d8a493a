"""Which tokens a checkpoint's rows of the embeddings stand for, and whether two vocabularies fit together."""

from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError
from .checkpoint_files import Files
from .files import parse_object, quote


TOKENIZER_NAME = "tokenizer.json"
VOCABULARY_NAME = "vocab.json"
# The largest tokenizers (262k tokens) are 33 MB.
MAX_TOKENIZER_BYTES = 200_000_000

Vocabulary = Mapping[str, int]


def read_vocabulary(files: Files) -> Vocabulary | None:
    """
    Reads the tokens of a checkpoint's tokenizer with their ids, without running the tokenizer.

    Args:
        files (`Files`):
            The checkpoint's files.

    Returns:
        `Mapping[str, int]`: The ids, or None where there is no `tokenizer.json` or `vocab.json`.

    Raises:
        AdapterError: A file is malformed.
    """
    if files.has(TOKENIZER_NAME):
        return _from_tokenizer(parse_object(files.read(TOKENIZER_NAME, MAX_TOKENIZER_BYTES), TOKENIZER_NAME))
    if files.has(VOCABULARY_NAME):
        return _ids(parse_object(files.read(VOCABULARY_NAME, MAX_TOKENIZER_BYTES), VOCABULARY_NAME))
    return None


def check_vocabularies(found: Vocabulary, expected: Vocabulary) -> None:
    """
    Checks that one vocabulary extends the other: tokens that both have are the same rows of the embeddings.

    Args:
        found (`Mapping[str, int]`):
            The checkpoint's tokens.
        expected (`Mapping[str, int]`):
            The tokens of the tokenizer that training uses.

    Raises:
        AdapterError: They contradict each other.
    """
    small, large = sorted((found, expected), key=len)
    different = [token for token, index in small.items() if large.get(token) != index]
    if different:
        token = different[0]
        raise AdapterError(
            f"another vocabulary: {len(different)} of {len(small)} tokens differ, such as {quote(token, 40)!r} with "
            f"id {found.get(token)}, expected {expected.get(token)}; one vocabulary must extend the other"
        )


def _from_tokenizer(tokenizer: Mapping[str, Any]) -> Vocabulary:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram lists its tokens with their scores, in the order of their ids.
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise AdapterError(f"{TOKENIZER_NAME} holds no vocabulary")
    entries = [entry for entry in added if isinstance(entry, dict)]
    return _ids({**vocabulary, **{entry.get("content"): entry.get("id") for entry in entries}})


def _ids(vocabulary: Mapping[Any, Any]) -> Vocabulary:
    if not all(isinstance(token, str) and type(index) is int for token, index in vocabulary.items()):
        raise AdapterError("the tokenizer's vocabulary is not a mapping of tokens to ids")
    return dict(vocabulary)
