"""What strangers and users write, made up by hypothesis: any error other than the documented one is a bug."""

import dataclasses
import io
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from rich.console import Console

from mashup_callback import MashupReport, find_candidates
from mashup_callback.candidates import Candidate, hub_name, parse_spec, stated_datasets
from mashup_callback.errors import AdapterError
from mashup_callback.formats import BaseModel, parse_adapter, parse_config, parse_header, parse_index
from mashup_callback.report import CandidateRow, MergeInfo, RaceRound


texts = st.text(max_size=6) | st.sampled_from(["\ud800", "\x1b[31m", "a\nb", "(a+)+$", "../x", "model.safetensors"])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 5e-324])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def some(names, value=values, **always):
    """Objects with some of these keys."""
    return st.dictionaries(st.sampled_from(sorted(names)) | texts, value, max_size=5).map(lambda found: always | found)


def damaged(written):
    """The bytes of some JSON, or a part of them, with one other byte."""

    def damage(text, at, byte, end):
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if data and byte is not None:
            data[at % len(data)] = byte
        return bytes(data[: end if end is None else end % (len(data) + 1)])

    whole = written.map(json.dumps)
    byte, end = st.none() | st.integers(0, 255), st.none() | st.integers(0)
    return whole.map(str.encode) | st.builds(damage, whole, st.integers(0, 999), byte, end)


def nested(cls, **rows):
    return some([item.name for item in dataclasses.fields(cls)], **rows)


layers = {"a.q_proj": (4, 4), "b.q_proj": (4, 4)}
modules = st.sampled_from([*layers, "q_proj", "x"])
keys = st.builds("base_model.model.{}.lora_{}.weight".format, modules, st.sampled_from("AB"))
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "F64", "I8", "F4", "x"]) | values},
    optional={
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**62]), max_size=3) | values,
        "data_offsets": st.lists(st.sampled_from([0, 16, 32, 64, 2**63]), max_size=3) | values,
    },
)
configs = some([item.name for item in dataclasses.fields(LoraConfig)], peft_type="LORA", r=1, lora_alpha=8)
headers = st.dictionaries(keys | texts, entries | values, max_size=4)
rows = nested(CandidateRow, name="a", status="scored")
merges = nested(MergeInfo, method="linear", space="delta", parameters={}, rank=1, kept_energy=1.0, lost_energy=0.0)
reports = some(
    [item.name for item in dataclasses.fields(MashupReport)],
    values | st.lists(rows | nested(RaceRound, rows=1, entered=1, kept=1), max_size=3) | merges,
    decision="merged",
    reason="r",
    schema=1,
)
indexes = some(["weight_map"], st.dictionaries(texts, texts, max_size=3) | values)
pieces = "!!bool |!!int |!!float |!!timestamp |!!binary |!!set |!x |&a |*a |datasets: |- |: |? |[|]|{|}|'|<<|0x|1:|  "
pieces = [*pieces.split("|"), *'\n|>#%\t\0"\ud800', "2000-01-01", "---"]
metadata = st.lists(st.sampled_from(pieces) | texts, max_size=12).map("".join)
words = ["hub:", "collection:", "org/name", "author", "search", "tag", "limit", "sort", "downloads", "**"]
words += "@/*?[].=, ~9"
grammar = st.lists(st.sampled_from(words) | texts, max_size=6).map("".join)


def read_config(data):
    config = parse_config(data)
    assert 0 <= config.scaling_of("a.b", config.rank_of("a.b")) < float("inf")
    json.dumps(config.effective())


def read_adapter(found):
    config, header, size = found
    data = struct.pack("<Q", len(header)) + header
    parse_header(data, len(data) + size)
    adapter = parse_adapter(config, data, len(data) + size).fit(BaseModel(layers, name="org/base"))
    assert adapter.modules.keys() <= layers.keys() and all(warning.isprintable() for warning in adapter.warnings)


def read_report(data):
    report = MashupReport.from_json(data.decode("utf-8", "surrogatepass"))
    assert MashupReport.from_json(report.to_json()) == report
    report.show(Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8")))
    report.logs()


def read_card(text):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8", errors="surrogatepass")
        assert all(isinstance(name, str) for name in stated_datasets(Candidate("card", path=Path(directory))))


def read_spec(text):
    hub_name(text)
    spec = parse_spec(text)
    assert parse_spec(str(spec)) == spec
    # What leads out of the empty directory would look through this machine.
    if ".." not in text and not text.strip().startswith(("/", "~")):
        found = find_candidates(text, "org/base")
        assert all(item.reason for item in found)


TARGETS = {
    "configuration": (damaged(configs), read_config, AdapterError),
    "adapter": (
        st.tuples(damaged(configs), damaged(headers), st.sampled_from([0, 16, 32, 64, 2**62])),
        read_adapter,
        AdapterError,
    ),
    "index": (damaged(indexes), parse_index, AdapterError),
    "candidate": (grammar, read_spec, ValueError),
    "report": (damaged(reports), read_report, ValueError),
    "card": (metadata, read_card, ()),
}


def read(name, value):
    _, function, documented = TARGETS[name]
    try:
        function(value)
    except documented as error:
        assert len(str(error)) < 2000 and str(error).isprintable()


def fuzz(name, **budget):
    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **budget)
    @given(TARGETS[name][0])
    def run(value):
        read(name, value)

    run()


def a_report(**fields):
    return json.dumps({"decision": "merged", "reason": "r", "schema": 1} | fields).encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidate", "**"),
        ("candidate", "./**"),
        ("card", "a: !!bool foo"),
        ("card", "a: !!int ''"),
        ("card", "a: !!timestamp foo"),
        ("report", a_report(base_loss=10**400)),
        ("report", a_report(reason="\ud800")),
        ("report", a_report(config={"a": 0}).replace(b"0}", b"[" * 900 + b"]" * 900 + b"}")),
        ("report", a_report(base_loss=0).replace(b": 0", b": 1e999")),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_was_found_once(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(name, value)


def test_a_report_sends_a_terminal_nothing_but_text():
    file, rows = io.StringIO(), (CandidateRow("[b]a\x1b]0;x\x07", "scored"),)
    MashupReport("merged\x1b[31m", "r\x07", candidates=rows).show(Console(file=file, width=200))
    assert "[b]a?]0;x?" in file.getvalue() and not {"\x1b", "\x07"} & set(file.getvalue())


@pytest.mark.parametrize("name", TARGETS)
def test_a_little(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz(name, max_examples=200, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_lot(name, tmp_path, monkeypatch):
    """Takes four minutes on one core."""
    monkeypatch.chdir(tmp_path)
    fuzz(name, max_examples=3000)
    assert not os.listdir(tmp_path)
