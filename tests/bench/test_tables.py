"""Rates, the frontier, and pages."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rankwise.bench.markdown import Page, rates_page
from rankwise.bench.picture import Point, draw, frontier, place_names
from rankwise.bench.rates import RateRow, independence_sentence, likely, rate_row, rate_sentences, ratio_sentence
from rankwise.bench.statistics import Interval


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


def equal(rng, num_rates, num_seeds, num_tasks, common):
    """Validation losses of rates that are equally good: seeds decide, in part alike on all tasks."""
    found = {}
    for place in range(num_rates):
        seeds = rng.normal(0, common, (num_seeds, 1))
        own = [seeds + rng.normal(0, 0.05, (num_seeds, 1)) for _ in range(num_tasks)]
        found[10.0**place] = [one + rng.normal(0, 0.1, (num_seeds, 30)) for one in own]
    return found


@pytest.mark.parametrize(
    ("num_rates", "num_seeds", "num_tasks", "common"),
    [(2, 2, 1, 0.0), (2, 3, 2, 0.0), (5, 3, 2, 0.025)],
)
def test_equally_good_rates_are_seldom_told_apart(num_rates, num_seeds, num_tasks, common):
    """In about 6 of 100 tables at most; a plain bootstrap of the seeds did it in 40 to 50."""
    rng = np.random.default_rng(num_rates + num_seeds)
    trials = 200
    rows = [rate_row("m", equal(rng, num_rates, num_seeds, num_tasks, common), [], 100) for _ in range(trials)]
    assert sum(len(row.likely) < num_rates for row in rows) / trials <= 0.08  # its standard error is 1.7 points


def test_a_rate_stays_unless_it_is_surely_worse():
    """Two seeds: p of 0.02 alone tells a rate from the best one, but not as one of three pairs."""
    sure, unsure = Interval(0.1, 0.02, 0.18, 0.02), Interval(0.1, -0.1, 0.3, 0.4)
    assert likely({1.0: sure}) == [] and likely({1.0: sure, 2.0: unsure}) == [1.0, 2.0]
    assert likely({1.0: Interval(0.1, 0.05, 0.15, 0.001), 2.0: unsure}) == [2.0] and likely({}) == []


def test_a_best_rate_has_differences_to_the_others():
    row = rate_row("m", losses(1e-3, np.random.default_rng(2)), [])
    assert row.best == 1e-3 and set(row.differences) == {1e-4, 1e-2}
    assert row.differences[1e-4].mean == pytest.approx(row.losses[1e-4] - row.losses[1e-3])
    page = rates_page(Page("T", "", []), [row], [])
    one = row.differences[1e-2]
    assert f"| best | {one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}] |" in page


@pytest.mark.parametrize(
    ("ratio", "said"), [(3.0, True), (3.33, True), (30.0, True), (33.3, True), (2.0, False), (50.0, False)]
)
def test_ten_times_does_not_depend_on_how_a_grid_is_rounded(ratio, said):
    def row(name, best):
        return RateRow(name, {best / 10: 1.0, best: 0.5, best * 10: 1.0}, (), best, (best,))

    text = ratio_sentence(row("r8", ratio * 1e-4), row("full", 1e-4))
    assert text.endswith(": about ten times." if said else ": not about ten times.")


def test_independence_says_what_it_may_only_mean():
    sharp = RateRow("r1", {1.0: 2.0, 2.0: 1.0, 3.0: 2.0}, (), 2.0, (2.0,))
    wide = RateRow("r2", {1.0: 2.0, 2.0: 1.0, 3.0: 1.1, 4.0: 2.0}, (), 2.0, (2.0, 3.0))
    edge = RateRow("r4", {1.0: 2.0, 2.0: 1.0}, (), 2.0, (2.0,))
    assert independence_sentence([sharp, sharp]).endswith("no dependence seen.")
    assert "may only mean that up to 2 rates of a method can't be told apart" in independence_sentence([sharp, wide])
    assert independence_sentence([sharp, edge]).endswith(
        "The grid ends at a best rate of r4: a better one may lie outside."
    )


def test_the_frontier_has_no_beaten_point():
    points = [Point("a", 10, 1.0), Point("b", 20, 1.2), Point("c", 20, 0.9), Point("d", 40, 0.9), Point("e", 80, 0.5)]
    assert [point.name for point in frontier(points)] == ["a", "c", "e"]


@pytest.mark.parametrize("points", [[Point("base", 0, 1.0)], [Point("base", 0, 1.0), Point("a", 10, 0.5, 0.1)]])
def test_a_picture_is_drawn(points, tmp_path):
    draw(points, "T", tmp_path / "t.png")
    first = (tmp_path / "t.png").read_bytes()
    draw(points, "T", tmp_path / "t.png")
    assert first.startswith(b"\x89PNG") and (tmp_path / "t.png").read_bytes() == first


def test_names_of_near_points_do_not_overlap():
    figure = Figure(figsize=(9, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlim=(1e5, 1e8), ylim=(1.5, 2.8))
    points = [Point("lora-r8", 2_440_000, 1.707), Point("dora-r8", 2_600_000, 1.705), Point("full", 50_000_000, 1.6)]
    near = [Point(f"at-{i}", 2_440_000, 2.0) for i in range(5)]
    canvas.draw()
    names = place_names([*points, *near], axes)
    canvas.draw()
    boxes = [name.get_window_extent() for name in names]
    assert [name.get_text() for name in names] == [point.name for point in [*points, *near]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
