"""Progress: one line a stage in a log; on a terminal a bar that counts rows, and that ends."""

import io

import pytest
import torch
from rich.console import Console

from mashup_callback import progress
from mashup_callback.scoring import evaluate
from mashup_callback.scoring.sample import SampleRows
from tests.tiny import llama


def test_a_log_gets_one_line_a_stage(capsys):
    with progress.stage("scoring 3 candidates", 6) as shown:
        progress.advance(2)
        assert shown.done == 2
    progress.advance(2)
    with pytest.raises(OSError), progress.stage("failing"):
        raise OSError
    assert capsys.readouterr().err == "mashup: scoring 3 candidates: 0.0 s\n"


@pytest.mark.parametrize("total", [8, None])
def test_a_bar_counts_the_rows_of_batches_and_ends(monkeypatch, total):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    row = {"input_ids": torch.arange(4), "labels": torch.arange(4)}
    rows = SampleRows([row] * 4, lambda rows: {name: torch.stack([row[name] for row in rows]) for name in row}, 2)
    with progress.stage("scoring", total) as shown, torch.no_grad():
        evaluate(llama(), rows)
        assert shown.done == 4
    assert shown.bar.finished and "100%" in file.getvalue() and "scoring" in file.getvalue()
