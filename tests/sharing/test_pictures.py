"""The picture of the ranking: nothing is cut off or covered, and one large loss does not squeeze the others."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mashup_callback.report import CandidateRow, MashupReport
from mashup_callback.sharing import ranking, style
from recipes.leave_one_out.figures import spread


def row(name, loss, weight=None):
    return CandidateRow(name, "scored", loss=loss, weight=weight)


REPORTS = {
    "merged": MashupReport(
        "merged", "", 8.9, 0.8, 0.9, candidates=(row("a", 1.0, 0.5), row("b", 1.1, 0.5), row("c", 40))
    ),
    "single": MashupReport("single", "", 1.2, 1.3, 0.9, candidates=(row("long" * 40, 1.0, 1.0), row("b", 3.0))),
    "scratch": MashupReport("scratch", "", 1.0, 1.2, 1.1, candidates=(row("a", 1e-4), row("b", 1e4))),
    "score": MashupReport("merged", "", -0.1, -0.9, -0.8, candidates=(row("a", -0.9, 0.5), row("b", -0.8, 0.5))),
    "many": MashupReport("merged", "", 2.0, 1.0, candidates=tuple(row(f"n{i}", 1 + i, 1.0) for i in range(99))),
    "unguarded": MashupReport("merged", "", candidates=(row("a", 1.0, 1.0),)),
    "dollars": MashupReport("merged", "", candidates=(row("a$^$", 1.0, 1.0),)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_everything_is_inside_the_picture(name, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure) or figure.savefig(path))
    assert ranking.plot_ranking(REPORTS[name], tmp_path / "a.png")
    [figure] = drawn
    inside = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert inside.x0 >= -0.02 and inside.y0 >= -0.02 and inside.x1 <= width + 0.02 and inside.y1 <= height + 0.02
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)


def test_a_large_loss_is_cut_off_and_says_so(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, path: drawn.append(figure))
    ranking.plot_ranking(REPORTS["merged"], tmp_path / "a.png")
    upper, lower = drawn[0].axes
    assert [bar.get_width() for bar in upper.patches] == [1.0, 1.1, pytest.approx(3.3)]
    assert [text.get_text() for text in upper.texts] == [
        "1.000, weight 0.50",
        "1.100, weight 0.50",
        "40.000 (bar cut off)",
    ]
    assert lower.texts[0].get_text() == "8.900 (bar cut off)"
    title = drawn[0].get_suptitle()
    assert title == "Training starts from a merge of 2 candidates: held-out loss 0.800 instead of 8.900"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_are_apart_and_in_order(places):
    found = spread(places, 0.05)
    order = sorted(range(len(places)), key=places.__getitem__)
    gaps = [found[after] - found[before] for before, after in pairwise(order)]
    assert all(gap >= 0.05 - 1e-3 for gap in gaps)
    if all(places[after] - places[before] >= 0.05 for before, after in pairwise(order)):
        assert found == pytest.approx(places)
