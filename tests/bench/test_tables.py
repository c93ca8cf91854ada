"""Rates, the frontier, and pages."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.bench.markdown import Page, rates_page
from rankwise.bench.picture import Point, draw, frontier
from rankwise.bench.rates import likely, rate_row, rate_sentences


def losses(best, rng, sharp=1.0, rates=(1e-4, 1e-3, 1e-2)):
    """Validation losses of 4 seeds and 60 examples, lowest at `best`."""
    hard = rng.gamma(2.0, 0.3, (1, 60))
    return {rate: [hard + sharp * 0.1 * abs(np.log10(rate / best)) + rng.normal(0, 0.02, (4, 60))] for rate in rates}


def test_the_best_rate_ten_times_and_independence():
    rng = np.random.default_rng(0)
    rows = [
        rate_row("full", losses(1e-3, rng, rates=(1e-4, 1e-3, 1e-2)), []),
        rate_row("r1", losses(1e-2, rng, rates=(1e-3, 1e-2, 1e-1)), []),
        rate_row("r16", losses(1e-2, rng, rates=(1e-3, 1e-2, 1e-1)), []),
    ]
    assert [row.best for row in rows] == [1e-3, 1e-2, 1e-2] and rows[1].likely == (1e-2,)
    said = rate_sentences(rows, "full")
    assert said[3] == "r1 against full: 10 times (10 to 10): about ten times."
    assert said[-1] == "r1, r16: 0.01 is among the best for each: no dependence seen."
    other = rate_row("r64", losses(1e-1, rng, rates=(1e-2, 1e-1, 1.0)), [])
    assert "not about ten times" in rate_sentences([rows[0], other], "full")[2]
    assert "differ by a factor of 10" in rate_sentences([rows[0], rows[1], other], "full")[-1]


def test_a_best_rate_at_the_edge_and_one_that_is_not_sure():
    rng = np.random.default_rng(1)
    edge = rate_row("edge", losses(1e-2, rng), [])
    assert edge.is_at_edge and "may lie outside" in rate_sentences([edge], None)[0]
    flat = rate_row("flat", losses(1e-3, rng, sharp=0.0), [1e-1])
    assert len(flat.likely) > 1
    said = rate_sentences([edge, flat], "edge")
    assert "not told apart from" in said[1] and "not run: 0.1" in said[1] and "undecided" in said[2]
    empty = rate_row("empty", {}, [1e-3])
    assert rate_sentences([empty], None)[0] == "empty is undecided: no rate has been run."
    page = rates_page(Page("T", "", []), [edge, flat, empty], said)
    assert "| empty |  |  |  |  |" in page


def test_likely_choices_make_up_95_in_100():
    assert likely({1.0: 0.9, 2.0: 0.06, 3.0: 0.04}) == (1.0, 2.0)
    assert likely({1.0: 1.0, 2.0: 0.0}) == (1.0,)


def test_the_frontier_has_no_beaten_point():
    points = [Point("a", 10, 1.0), Point("b", 20, 1.2), Point("c", 20, 0.9), Point("d", 40, 0.9), Point("e", 80, 0.5)]
    assert [point.name for point in frontier(points)] == ["a", "c", "e"]


@pytest.mark.parametrize("points", [[Point("base", 0, 1.0)], [Point("base", 0, 1.0), Point("a", 10, 0.5, 0.1)]])
def test_a_picture_is_drawn(points, tmp_path):
    draw(points, "T", tmp_path / "t.png")
    first = (tmp_path / "t.png").read_bytes()
    draw(points, "T", tmp_path / "t.png")
    assert first.startswith(b"\x89PNG") and (tmp_path / "t.png").read_bytes() == first
