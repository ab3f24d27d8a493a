"""Rows of a data set on disk or on the Hub, tokenized as TRL's SFTTrainer does. For the command line only."""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset, load_from_disk
from torch import nn
from trl import SFTConfig, SFTTrainer

from .scoring import SampleRows, token_budget


_FORMS = ({"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(dataset: str, split: str, subset: str | None, sample_size: int, seed: int) -> Dataset:
    """Draws rows of a file, a directory or a data set on the Hub, in columns that SFTTrainer can take."""
    try:
        rows = _load(dataset, split, subset)
    except StopIteration:
        # What datasets raises for an empty file.
        rows = Dataset.from_dict({})
    if not len(rows):
        raise ValueError(f"{dataset!r} has no rows in its split {split!r}, expected at least one. Give other data.")
    if not any(form <= set(rows.column_names) for form in _FORMS):
        raise ValueError(
            f"{dataset!r} has the columns {', '.join(rows.column_names)}; expected text, messages (a chat), or prompt "
            "and completion. Rename the columns."
        )
    # Before it is tokenized: that would take hours for a large data set.
    return rows.shuffle(seed=seed).select(range(min(sample_size, len(rows))))


def sft_rows(
    model: nn.Module, rows: Dataset, max_length: int, batch_size: int, assistant_only_loss: bool = False
) -> SampleRows:
    """Returns rows in the form in which SFTTrainer would train on them; the model goes to the accelerator."""
    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            output_dir=directory,
            per_device_train_batch_size=batch_size,
            max_length=max_length,
            assistant_only_loss=assistant_only_loss,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            report_to="none",
        )
        loader = SFTTrainer(model, args=args, train_dataset=rows).get_train_dataloader()
    return SampleRows(
        [loader.dataset[index] for index in range(len(loader.dataset))], loader.collate_fn, batch_size, token_budget()
    )


def _load(dataset: str, split: str, subset: str | None) -> Dataset:
    path = Path(dataset).expanduser()
    if not path.exists() and (path.suffix.lower() in _FORMATS or dataset.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no data file {dataset!r}. Give a file, a directory or a data set's name.")
    if path.is_file():
        kind = _FORMATS.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"{dataset!r} is no {', '.join(_FORMATS)} file. Convert it, or give a directory.")
        return load_dataset(kind, data_files=str(path), split=split)
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"{dataset!r} has no split {split!r}, expected one of {', '.join(splits)}.")
        return splits[split]
    if (path / "state.json").is_file():
        return load_from_disk(str(path))
    return load_dataset(str(path) if path.is_dir() else dataset, subset, split=split)
