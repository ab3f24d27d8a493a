"""The model card: what was merged, how good it is, and nothing that others wrote as markup."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mashup_callback.candidates import hub_name
from mashup_callback.report import CandidateRow
from mashup_callback.sharing.card import base_name, mashup_card, shared_license
from mashup_callback.sharing.save import describe, save_mashup
from tests.hub.views import front_matter
from tests.sharing.mashups import MERGE, REPORT, SHA, SOURCES, write_adapter


ADAPTER = {"task_type": "CAUSAL_LM"}


def rendered(card):
    """Every Markdown token of a card's body, as an independent parser reads it."""
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return tokens + [child for token in tokens for child in token.children or ()]


def test_card_says_what_was_merged_and_how_good_it_is():
    card = mashup_card(REPORT, ADAPTER)
    about = front_matter(card)
    [index] = about.pop("model-index")
    assert [(item["type"], item["value"]) for item in index["results"][0]["metrics"]] == [("loss", 1.4321)]
    assert about == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "datasets": ["acme/arc"],
        "tags": ["mashup", "merge", "lora"],
    }
    cells = [token.content for token in rendered(card) if token.type == "inline"]
    source = [cells[index : index + 5] for index, cell in enumerate(cells) if f"/tree/{SHA}" in cell]
    assert [[row[0].split("`")[1], *row[1:]] for row in source] == [
        ["acme/one", f"`{SHA}`", "0.7500", "1.2500", "`mit`"],
        ["acme/two/sub/folder", f"`{SHA}`", "0.2500", "1.5000", "`mit`"],
    ]
    links = [token.attrs["href"] for token in rendered(card) if token.type == "link_open"]
    assert [link.split("/", 3)[3] for link in links[-2:]] == [
        f"acme/one/tree/{SHA}",
        f"acme/two/tree/{SHA}/sub/folder",
    ]
    for name, loss in (("fresh initialization", "2.0000"), ("best single adapter", "1.5432"), ("merge", "1.4321")):
        assert cells[cells.index(name) + 1] == loss
    assert "acme/three" not in card
    assert f"mashup merge acme/one@{SHA} acme/two/sub/folder@{SHA} --weights=0.75,0.25 --method=linear" in card
    assert "--seed=7" in card
    assert "Warning" not in card


@pytest.mark.parametrize(
    ("licenses", "expected", "warned"),
    [
        (("mit", "mit"), "mit", False),
        (("MIT ", "mit"), "mit", False),
        (("mit", "apache-2.0"), "other", True),
        (("mit", None), "other", True),
        (("other", "other"), "other", True),
        (("mit\nlicense: apache-2.0",), "other", True),
        (("<b>", "<b>"), "other", True),
        ((None, None), None, False),
        ((), None, False),
    ],
)
def test_license_only_if_the_sources_agree(licenses, expected, warned):
    name, warning = shared_license([CandidateRow("acme/x", "scored", license=name) for name in licenses])
    assert (name, warning is not None) == (expected, warned)
    if warned:
        assert all(f"`{name}`" in warning for name in licenses if name and name.isprintable())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("acme/base", "acme/base"),
        ("gpt2", "gpt2"),
        (None, None),
        ("", None),
        ("/data/models/base", None),
        ("./base", None),
        ("../acme/base", None),
        ("acme/base/sub", None),
        ("acme/base\ntags: [x]", None),
        (f"/home/me/.cache/huggingface/hub/models--acme--base/snapshots/{SHA}", "acme/base"),
        ("C:\\cache\\models--acme--base\\snapshots\\x", "acme/base"),
    ],
)
def test_hub_name(text, name):
    assert hub_name(text) == name


def test_local_base_is_left_out_unless_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = replace(REPORT, base_model=str(tmp_path))
    card = mashup_card(local, ADAPTER)
    assert "base_model" not in front_matter(card)
    assert str(tmp_path) not in card
    assert "The setting `base_model`" in card
    (tmp_path / "acme" / "base").mkdir(parents=True)
    assert base_name(REPORT) is None
    assert base_name(replace(REPORT, config={"base_model": "acme/base"})) == "acme/base"


def test_card_of_a_merge_that_lost():
    lost = replace(REPORT, decision="scratch", reason="nothing is better")
    assert "not better than a fresh initialization" in mashup_card(lost, ADAPTER)
    # On the held-out rows it was better; what it is in the model that is trained has no number here.
    card = mashup_card(replace(lost, expected_loss=1.4, swapped_loss=9.0), ADAPTER)
    assert "not better than" not in card and "it was taken back" in card
    assert "model-index" not in front_matter(card)


def test_a_license_that_is_not_known_is_not_called_missing():
    # Of a commit that is in the cache nothing is asked, and no file there need say it.
    cached = replace(REPORT, candidates=(replace(SOURCES[0], license=None),))
    assert "| 1.2500 | not known |" in mashup_card(cached, ADAPTER)


MARKUP = ("`", "``", "```\n", "|", "\\|", "\\", "\n", "\n---\n", "# h", ": [", "\u202e", "a", " ", "<!-", "<b>")
LINKS = ("[a](b:c)", "![x](http://e.x/y)", "<script>alert(1)</script>", "<!-- comment -->")
hostile = st.text(max_size=40) | st.lists(st.sampled_from(MARKUP + LINKS), max_size=8).map("".join)


@settings(max_examples=100, deadline=None)
@given(names=st.lists(hostile, min_size=1, max_size=3), text=hostile, decision=st.sampled_from(["merged", "scratch"]))
def test_nothing_a_stranger_wrote_is_markup(names, text, decision):
    """HTML, links, images and table cells are only our own, whatever names, licences and parameters hold."""
    rows = tuple(CandidateRow(name, "scored", text, weight=0.5, license=text or None) for name in names)
    merge = replace(MERGE, method=text, space=text, mergekit_version=text, parameters={text: 0.5})
    fields = {"reason": text, "base_model": text, "environment": {text: text}}
    report = replace(REPORT, candidates=rows, merge=merge, decision=decision, **fields)
    card = mashup_card(report, {"task_type": text})
    tokens = rendered(card)
    assert not [token for token in tokens if token.type.startswith("html")]
    assert not [token for token in tokens if token.type == "image"]
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert all(link == "https://arxiv.org/abs/2603.10156" or "/tree/" in link for link in links)
    assert sum(token.type == "td_open" for token in tokens) == 5 * len(rows) + 2 * 3
    assert next(token.content for token in tokens if token.type == "inline" and token.level == 1) == "Mashup"
    assert sum(token.type == "heading_open" for token in tokens) == 6
    ours = {"base_model", "base_model_relation", "library_name", "license", "model-index", "pipeline_tag", "tags"}
    assert set(front_matter(card)) <= ours


def test_card_of_a_single_adapter_and_of_local_ones():
    """What others cannot do is not told them, and one adapter is no merge."""
    single = replace(REPORT, decision="single", candidates=(replace(SOURCES[0], weight=3.0), *SOURCES[2:]))
    card = mashup_card(single, ADAPTER)
    assert "the best of the past adapters compared" in card and "merged from" not in card and "Method" not in card
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 1.5432
    assert "| 1.0000 | 1.2500 |" in card and "--weights=3.0" in card
    local = replace(REPORT, candidates=(SOURCES[0], CandidateRow("./b", "scored", weight=1.0)))
    card = mashup_card(local, ADAPTER)
    assert "`./b` is not on the Hub" in card and "mashup merge" not in card


def test_card_shows_the_picture_the_versions_and_what_to_cite(tmp_path):
    save_mashup(tmp_path / "out", replace(REPORT, environment={"python": "3.11", "trl": None}), write_adapter)
    card = (tmp_path / "out/README.md").read_text()
    images = [token.attrs["src"] for token in rendered(card) if token.type == "image"]
    assert images == ["ranking.png"] and (tmp_path / "out/ranking.png").is_file()
    assert "Made with `python 3.11`." in card and "eprint = {2603.10156}" in card


def test_card_of_a_full_model():
    report = replace(REPORT, merge=replace(MERGE, space="weights", rank=0))
    card = mashup_card(report, None)
    assert (front_matter(card)["library_name"], front_matter(card)["tags"]) == ("transformers", ["mashup", "merge"])
    assert front_matter(card)["base_model_relation"] == "finetune"
    assert "A full model of `acme/base`, merged from past models" in card
    assert "peft" not in card and "rank" not in card
    assert "mergekit-yaml mergekit.yaml merged --random-seed=7" in card


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["LlamaForSequenceClassification"], "LlamaForSequenceClassification"), (["os; x"], "AutoModelForCausalLM")],
)
def test_card_of_a_full_model_names_its_class(tmp_path, names, expected):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": names}))
    describe(tmp_path, REPORT)
    assert f"model = {expected}.from_pretrained(" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("task_type", "name"), [("SEQ_CLS", "SequenceClassification"), (None, "CausalLM")])
def test_card_uses_the_class_of_the_task(task_type, name):
    assert f"AutoModelFor{name}.from_pretrained('acme/base')" in mashup_card(REPORT, {"task_type": task_type})
