"""The report survives JSON, shows what happened, and can be read by other versions."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mashup_callback.lowrank import in_float64
from mashup_callback.report import CandidateRow, MashupReport, MergeInfo, environment
from mashup_callback.sharing.save import plot_ranking


number = st.none() | st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    CandidateRow,
    name=st.text(min_size=1),
    status=st.sampled_from(["scored", "eliminated", "rejected", "failed"]),
    reason=st.none() | st.text(),
    loss=number,
    weight=number,
    warnings=st.lists(st.text()).map(tuple),
)
merges = st.builds(
    MergeInfo,
    method=st.just("linear"),
    space=st.just("delta"),
    parameters=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    rank=st.integers(1, 64),
    kept_energy=st.floats(0, 1),
    kept_energy_by_module=st.dictionaries(st.text(), st.floats(0, 1)),
    lost_energy=st.floats(0, 1),
    lost_layers=st.lists(st.text()).map(tuple),
    mergekit_version=st.just("0.1.5"),
)
reports = st.builds(
    MashupReport,
    decision=st.sampled_from(["merged", "single", "scratch"]),
    reason=st.text(),
    base_loss=number,
    merged_loss=number,
    candidates=st.lists(rows, max_size=4).map(tuple),
    merge=st.none() | merges,
    timings=st.dictionaries(st.text(), st.floats(0, 100)),
)


@given(reports)
def test_json_round_trip(report):
    assert MashupReport.from_json(report.to_json()) == report


@given(reports)
def test_table_shows_every_candidate(report):
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(console)
    assert console.export_text().count("held-out rows") >= 3


def test_hostile_names_are_shown_as_they_are():
    report = MashupReport("scratch", "[red]reason[/red]", candidates=(CandidateRow("[bold]a[/nope]", "scored"),))
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    assert "[bold]a[/nope]" in text and "[red]reason[/red]" in text


def test_fields_of_later_versions_are_ignored():
    values = json.loads(MashupReport("scratch", "why").to_json())
    assert MashupReport.from_json(json.dumps({**values, "later": 1})).reason == "why"


@pytest.mark.parametrize("text", ["[]", "{}", '{"decision": "merged"}'])
def test_what_is_no_report(text):
    with pytest.raises(ValueError, match="not a mashup report"):
        MashupReport.from_json(text)


def test_save_leaves_no_temporary_file(tmp_path):
    report = MashupReport("scratch", "why")
    report.save(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert MashupReport.load(tmp_path) == MashupReport.load(tmp_path / "report.json") == report


def test_picture_of_the_ranking(tmp_path):
    rows = (CandidateRow("a", "scored", loss=1.0, weight=1.0), CandidateRow("b" * 99, "scored", loss=2.0))
    assert plot_ranking(MashupReport("merged", "why", 2.0, 1.0, candidates=rows), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_ranking(MashupReport("scratch", "why"), tmp_path / "b.png")


def json_with(**values):
    return json.dumps({**json.loads(MashupReport("scratch", "why").to_json()), **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schema": 2}, "has `schema` 2, expected 1"),
        ({"schema": None}, "has `schema` None, expected 1"),
        ({"candidates": "a"}, "`candidates` is 'a'"),
        ({"candidates": [1]}, "`candidates` is '1'"),
        ({"candidates": [{"name": "a"}]}, "has no `status`"),
        ({"candidates": [{"name": "a", "status": "scored", "loss": "low"}]}, "`loss` is 'low'"),
        ({"merge": {"method": "linear"}}, "has no `space`"),
        ({"timings": {"all": "long"}}, "`timings` is 'long'"),
        ({"base_loss": True}, "`base_loss` is 'True'"),
        ({"base_loss": float("nan")}, "not a mashup report"),
        ({"reason": 3}, "`reason` is '3'"),
    ],
)
def test_a_report_of_another_shape_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        MashupReport.from_json(json_with(**values))


def test_a_report_is_found_from_the_runs_directory(tmp_path):
    (tmp_path / "run/mashup").mkdir(parents=True)
    report = MashupReport("scratch", "why")
    report.save(tmp_path / "run/mashup/report.json")
    assert MashupReport.load(tmp_path / "run") == MashupReport.load(tmp_path / "run/mashup") == report
    with pytest.raises(FileNotFoundError, match=r"no .*report\.json and no .*mashup.report\.json, expected"):
        MashupReport.load(tmp_path)


def test_the_environment_of_an_apple_gpu(monkeypatch):
    """torch.mps, as it is installed, has no get_device_name."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert environment()["device"] == "mps"


def test_float64_is_not_asked_of_an_apple_gpu():
    class OnMps:
        device = torch.device("mps")

        def cpu(self):
            return torch.ones(2)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64")

    assert in_float64(OnMps()).dtype == torch.float64
