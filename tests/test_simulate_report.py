"""The report: one file that needs nothing else, whose plots say what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from shoal.node.simulate.charts import Line, bars, lines, round_up, strips
from shoal.node.simulate.options import Options
from shoal.node.simulate.outcome import Life, Outcome, Sample
from shoal.node.simulate.report import page, smoothed, write_report
from shoal.protocol.errors import StorageError


def outcome() -> Outcome:
    options = Options(
        peers=3,
        duration_s=60.0,
        warmup_s=40.0,
        seed=9,
        session_s=50.0,
        micro_batch_s=1.0,
        policies_only=False,
    )
    found = Outcome(options, 2, 128, (1.0, 2.0), micro_batches=30, joins=1, kills=1, lost=2, rounds=[3, 4])
    found.samples = [Sample(float(10 * n), 0.5, 1.0, (0.6 + 0.1 * n, 0.9)) for n in range(1, 11)]
    found.lives = [Life(1.0, 0.0), Life(1.0, 0.0, 55.0), Life(2.0, 57.0)]
    found.reroutes = [(20.0, 0.3), (50.0, 300.0)]
    found.bytes_by_use = {"rounds": 2e6, "pipeline": 5e6}
    return found


def test_the_page_is_whole_without_a_network() -> None:
    text = page(outcome(), "night <run>")
    for attribute in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', text):
        raise AssertionError(f"the page refers to {attribute}")
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert "night &lt;run&gt;" in text and "<run>" not in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5  # throughput, balance, peers, re-routing, bytes
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_figures_are_the_outcomes() -> None:
    found = outcome()
    text = page(found, "run")
    ideal = (60.0 + 15.0 + 2.0 * 43.0) / 3.0
    assert found.ideal_micro_batches == pytest.approx(ideal)
    assert f"{30 / ideal:.1%}" in text
    assert "3, 4" in text and "5.0 MB" in text and "over 100 s" in text


def test_the_slowest_stage_is_marked() -> None:
    found = outcome()
    assert found.bottlenecks() == {1: 1.0}  # after the warm-up stage 0 has more
    assert [sample.bottleneck for sample in found.samples[:2]] == [0, 0]


def test_plots_take_nothing_too_much_and_nothing() -> None:
    for drawing in (
        lines([], "empty"),
        lines([Line("flat", [(0.0, 0.0), (1.0, 0.0)])], "flat"),
        strips([], 1.0, [], "none"),
        strips([[2.0, -1.0]] * 40, 1.0, [0, 39], "many"),
        bars([("nobody", 0.0, "0")], "zero"),
    ):
        ElementTree.fromstring(drawing)
    assert [round_up(value) for value in (0.0, 0.7, 1.0, 3.0, 51.0)] == pytest.approx([1, 1, 1, 5, 100])
    assert smoothed([3.0] * 20) == pytest.approx([3.0] * 20)


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(outcome(), "run", tmp_path / "missing" / "out.html")
