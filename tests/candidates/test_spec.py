"""The grammar of a candidate."""

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mashup_callback.candidates import Spec, parse_spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs", Spec("path", path="runs")),
        ("runs/*", Spec("path", path="runs/*")),
        ("./org/name", Spec("path", path="./org/name")),
        ("~/runs/x", Spec("path", path="~/runs/x")),
        ("/abs/[ab]", Spec("path", path="/abs/[ab]")),
        ("my runs/x", Spec("path", path="my runs/x")),
        ("org/name/../x", Spec("path", path="org/name/../x")),
        ("org/name", Spec("repo", repo_id="org/name")),
        (" org/name@v1.0 ", Spec("repo", repo_id="org/name", revision="v1.0")),
        ("org/name@refs/pr/1", Spec("repo", repo_id="org/name", revision="refs/pr/1")),
        ("org/na.me/sub/folder@abc", Spec("repo", repo_id="org/na.me", subfolder="sub/folder", revision="abc")),
        ("_org/_name/lr=1e-4,r=8", Spec("repo", repo_id="_org/_name", subfolder="lr=1e-4,r=8")),
        ("runs/x/checkpoint-300", Spec("repo", repo_id="runs/x", subfolder="checkpoint-300")),
        (
            "hub:author=acme,search=code,tag=x,tag=y,limit=50,sort=downloads",
            Spec("search", author="acme", search="code", tags=("x", "y"), limit=50, sort="downloads"),
        ),
        ("hub:search=a=b", Spec("search", search="a=b")),
        ("collection:org/best-65f0c1", Spec("collection", collection="org/best-65f0c1")),
    ],
)
def test_parse_spec(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a local directory or a glob"),
        ("  ", "collection:org/slug"),
        ("a\0b", "expected a local directory"),
        ("https://huggingface.co/org/name", "give only the part org/name"),
        ("collections:org/x", "no form of candidate"),
        ("org/name@", "names no revision"),
        ("hub:", "searches for nothing"),
        ("hub:athor=acme", "unknown key 'athor'.*Did you mean 'author'"),
        ("hub:author=", "'author' without a value"),
        ("hub:author=a,author=b", "'author' twice"),
        ("hub:limit=0", "limit is '0', expected a positive number"),
        ("hub:limit=-3", "limit is '-3'"),
        ("hub:limit=1.5", "limit is '1.5'"),
        ("hub:limit=٣", "expected a positive number"),
        ("hub:sort=download", "Did you mean 'downloads'"),
        ("collection:org", "expected collection:org/slug"),
    ],
)
def test_parse_spec_explains_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(text)


@given(st.one_of(st.text(), st.text(string.ascii_letters + "/.@:=,*~- 0", max_size=30)))
@example("hub:limit=" + "9" * 5000)
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_a_value_error_and_round_trips(text):
    try:
        spec = parse_spec(text)
    except ValueError as error:
        assert type(error) is ValueError
    else:
        assert parse_spec(str(spec)) == spec


word = st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True)
searches = st.builds(
    Spec,
    kind=st.just("search"),
    author=word,
    search=st.none() | word,
    tags=st.lists(word, max_size=3).map(tuple),
    limit=st.none() | st.integers(1, 10**9 - 1),
    sort=st.sampled_from([None, "downloads", "likes"]),
)
repos = st.builds(
    Spec,
    kind=st.just("repo"),
    repo_id=st.builds("{}/{}".format, word, word),
    subfolder=st.none() | st.lists(word, min_size=1, max_size=3).map("/".join),
    revision=st.none() | word,
)


@given(st.one_of(searches, repos))
def test_every_spec_is_parsed_back_from_its_text(spec):
    assert parse_spec(str(spec)) == spec
