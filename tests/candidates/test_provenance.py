"""A candidate that saw the target's data is warned of; a card that cannot be read says nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mashup_callback import MashupCallback
from mashup_callback.candidates import Candidate, find_candidates, stated_datasets
from mashup_callback.candidates.provenance import dataset_names
from tests.tiny import rows, save_random_adapter, sft_trainer


@pytest.mark.parametrize(
    ("card", "names"),
    [
        ("---\ndatasets:\n- acme/Code\n- other\n---\n# Card", ("acme/Code", "other")),
        ("---\ndatasets: acme/code\n---\n", ("acme/code",)),
        ("---\ndatasets: 7\n---\n", ("7",)),
        ("---\ndatasets: [1, [a]]\n---\n", ("1",)),
        ("---\n- a\n---\n", ()),
        ("---\n: : [\n---\n", ()),
        ("datasets: code\n", ()),
        ("---\na: !!python/object/apply:os.getcwd []\n---\n", ()),
    ],
)
def test_card(tmp_path, card, names):
    (tmp_path / "README.md").write_text(card)
    assert stated_datasets(Candidate("card", path=tmp_path)) == names


def test_names_on_record():
    info = SimpleNamespace(dataset_name="capybara", download_checksums={"hf://datasets/Acme/Code@abc/x.parquet": {}})
    assert dataset_names(SimpleNamespace(info=info)) == {"capybara", "code"}
    assert dataset_names([1, 2]) == dataset_names(rows()) == set()


@pytest.mark.parametrize("says", ["card", "hub"])
def test_warning_in_the_report(tmp_path, monkeypatch, says):
    for name in ("same", "other"):
        save_random_adapter(tmp_path / "runs" / name, 0 if name == "same" else 1)
        (tmp_path / "runs" / name / "README.md").write_text(f"---\ndatasets: acme/{name * (says == 'card')}\n---\n")

    def of_the_hub(*args, **settings):
        # Of a repository no card is downloaded.
        return [replace(item, datasets=(f"acme/{item.path.name}",)) for item in find_candidates(*args, **settings)]

    if says == "hub":
        monkeypatch.setattr("mashup_callback.pipeline.find_candidates", of_the_hub)
    data = rows()
    data.info.dataset_name = "same"
    callback = MashupCallback(str(tmp_path / "runs/*"))
    sft_trainer(tmp_path / "out", callbacks=[callback], train_rows=data, max_steps=1).train()
    warnings = {row.name.rpartition("/")[2]: row.warnings for row in callback.report.candidates}
    assert any("the data of this run" in warning for warning in warnings["same"])
    assert not any("the data of this run" in warning for warning in warnings["other"])
    assert {row.datasets for row in callback.report.candidates} == {("acme/same",), ("acme/other",)}
