"""The report survives JSON, shows what happened, and can be read by other versions."""

import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mashup_callback.lowrank import in_float64
from mashup_callback.names import labels
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


@settings(deadline=None, max_examples=50)
@given(reports)
def test_json_round_trip(report):
    assert MashupReport.from_json(report.to_json()) == report


@settings(deadline=None, max_examples=50)
@given(reports)
def test_table_shows_every_candidate(report):
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(console)
    # A first run has nothing to show in a table.
    if report.candidates or report.decision != "scratch":
        assert console.export_text().count("held-out rows") >= 3


def test_hostile_names_are_shown_as_they_are():
    report = MashupReport("scratch", "[red]reason[/red]", candidates=(CandidateRow("[bold]a[/nope]", "scored"),))
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(console)
    text = console.export_text()
    assert "[bold]a[/nope]" in text and "[red]reason[/red]" in text


@pytest.mark.parametrize(("others", "said"), [((), 1), (("b",), 1), (("b", "c"), 1), (("b", "without"), 2)])
def test_a_warning_of_every_candidate_is_said_once(others, said):
    rows = [CandidateRow(name, "scored", warnings=("old",) * (name != "without")) for name in ("a", *others)]
    rejected = CandidateRow("d", "rejected", reason="bad")
    text = on_console(MashupReport("scratch", "why", candidates=(*rows, rejected)))
    assert text.count("old") == said
    assert ("All candidates: old" in text) == (bool(others) and "without" not in others)


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
        ({"base_loss": float("nan")}, "holds what no report holds: .* not JSON compliant"),
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


def on_console(report, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    report.show(console)
    return console.export_text()


def merged_report(**fields):
    names = ("/data/team/runs/adapters/rising", "/data/team/runs/adapters/ending", "/data/team/runs/adapters/last")
    rows = tuple(CandidateRow(name, "scored", loss=1.0, weight=2.0, in_merge=True, rank=8) for name in names)
    behind = CandidateRow("/data/team/runs/adapters/units", "eliminated", reason="behind after 16 rows", loss=3.0)
    info = MergeInfo("linear", "delta", {}, 8, 0.9, {}, 0.0, (), "0.1.5")
    values = {"base_loss": 8.86, "merged_loss": 0.82, "single_loss": 0.97, "timings": {"scoring": 14.0}}
    return MashupReport("merged", "why", candidates=(*rows, behind), merge=info, **(values | fields))


def test_one_sentence_says_what_training_starts_from():
    report = merged_report(share=0.031)
    start = "Training starts from a merge of 3 adapters (rising, ending, last): held-out loss 0.82 instead of 8.86"
    assert report.summary() == f"{start}, 14 s, about 3% of the run."
    assert repr(report) == f"<MashupReport: {report.summary()}>"
    single = replace(
        report,
        decision="single",
        candidates=tuple(replace(row, weight=None if index else 1.0) for index, row in enumerate(report.candidates)),
    )
    assert single.summary().startswith("Training starts from the adapter rising: held-out loss 0.97 instead of 8.86")
    # What lost is named all the same, with digits that tell close losses apart.
    assert "merge of rising, ending, last" in " ".join(on_console(single, 120).split())
    lost = replace(report, decision="scratch", base_loss=0.815)
    assert "0.8150 is not clearly above 0.8200 of a merge of 3 adapters (rising, ending, last)" in lost.summary()
    taken_back = replace(report, decision="scratch", reason="the swap was taken back", expected_loss=0.8)
    assert taken_back.summary() == "Training starts from the fresh initialization: the swap was taken back."


def test_table_shows_short_names_and_shares():
    for width in (80, 120):
        text = on_console(merged_report(), width)
        assert max(map(len, text.splitlines())) <= width
        lines = [line for line in text.splitlines() if line.startswith("│ …/")]
        assert [line.split()[1] for line in lines] == ["…/rising", "…/ending", "…/last", "…/units"]
        assert [("33%" in line) for line in lines] == [True, True, True, False]
        assert "rank 8 keeps 90%" in " ".join(text.split()) or width == 80
    html = merged_report()._repr_mimebundle_([], [])["text/html"].strip()
    assert html.startswith("<pre") and html.endswith("</pre>") and "rising" in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept_energy": 0.16}, "rank 8 keeps 16% of the merge"),
        ({"lost_energy": 0.84, "lost_layers": ("q", "k", "v", "o")}, "84% of the merge is in 4 layers"),
        ({"space": "weights"}, "give the Trainer a `peft_config=LoraConfig(...)`"),
    ],
)
def test_what_is_lost_is_a_warning(changes, words):
    report = merged_report()
    assert "Warning" not in on_console(report)
    assert words in " ".join(on_console(replace(report, merge=replace(report.merge, **changes))).split())


def test_labels_differ_and_never_look_relative():
    names = [
        "/data/of/another/team/a/one",
        "/data/of/another/team/b/one",
        "/short/one",
        "runs/one",
        "acme/x",
        "acme/x",
    ]
    rows = [CandidateRow(name, "scored") for name in names[:4]]
    rows += [CandidateRow(name, "scored", digit * 40) for name, digit in zip(names[4:], "12", strict=True)]
    expected = ["…/a/one", "…/b/one", "/short/one", "runs/one", "acme/x@1111111", "acme/x@2222222"]
    assert labels(rows) == expected
