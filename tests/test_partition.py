"""The cut of layers into stages is the best one, and equal for all."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import SpecError
from shoal.training.partition import LayerCosts, layer_costs, partition, stage_costs, stage_ranges
from shoal.training.spec import DataSection, ModelSection, RunSpec, StagesSection

costs = st.integers(0, 1000).map(float)


def cuts(layers: int, count: int) -> list[tuple[range, ...]]:
    inner = itertools.combinations(range(1, layers), count - 1)
    return [tuple(itertools.starmap(range, itertools.pairwise((0, *cut, layers)))) for cut in inner]


def quality(block: list[float], first: float, last: float, ranges: tuple[range, ...]) -> tuple[float, float]:
    """Lower is better: the slowest stage, then the sum of squares."""
    sums = stage_costs(LayerCosts(tuple(block), first, last), ranges)
    return max(sums), sum(cost * cost for cost in sums)


@given(st.lists(costs, min_size=1, max_size=8), costs, costs, st.data())
def test_no_cut_is_better(block: list[float], first: float, last: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(block)))
    chosen = partition(block, first, last, count)
    assert chosen in cuts(len(block), count)
    best = min(quality(block, first, last, ranges) for ranges in cuts(len(block), count))
    assert quality(block, first, last, chosen) == best


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.data())
def test_measured_costs_give_contiguous_stages_with_a_layer_each(
    block: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(block)))
    ranges = partition(block, 0.5, 1.5, count)
    assert len(ranges) == count
    assert all(len(layers) > 0 for layers in ranges)
    assert list(itertools.chain(*ranges)) == list(range(len(block)))


def spec(layers: int, stages: int, vocabulary: int, first_layers: tuple[int, ...] = ()) -> RunSpec:
    return RunSpec(
        model=ModelSection(layers=layers, width=256, heads=4, kv_heads=4, feedforward=704),
        data=DataSection(vocabulary=vocabulary),
        stages=StagesSection(count=stages, first_layers=first_layers),
    )


def test_a_large_vocabulary_does_not_make_the_last_stage_the_slowest() -> None:
    large = spec(layers=24, stages=4, vocabulary=16_384)
    ranges = stage_ranges(large)
    *others, last = stage_costs(layer_costs(large), ranges)
    assert last <= max(others)
    assert len(ranges[-1]) == 2
    assert max(map(len, ranges[:-1])) - min(map(len, ranges[:-1])) <= 1
    even = tuple(range(start, start + 6) for start in range(0, 24, 6))
    assert max(last, *others) < 0.75 * stage_costs(layer_costs(large), even)[-1]


def test_where_the_head_outweighs_everything_the_other_stages_stay_even() -> None:
    ranges = stage_ranges(spec(layers=10, stages=4, vocabulary=1 << 20))
    assert [len(layers) for layers in ranges] == [3, 3, 3, 1]


def test_equal_layers_and_light_ends_are_cut_evenly() -> None:
    assert stage_ranges(spec(8, 4, 257)) == (range(0, 2), range(2, 4), range(4, 6), range(6, 8))
    assert stage_ranges(spec(5, 1, 257)) == (range(0, 5),)


def test_the_spec_may_fix_the_cut() -> None:
    assert stage_ranges(spec(8, 3, 257, (0, 1, 7))) == (range(0, 1), range(1, 7), range(7, 8))


def test_longer_sequences_make_blocks_dearer_but_not_the_head() -> None:
    short, long = (layer_costs(RunSpec(model=ModelSection(sequence=sequence))) for sequence in (128, 4096))
    assert long.blocks[0] > short.blocks[0]
    assert long.last_extra == short.last_extra


def test_a_slow_layer_gets_a_stage_of_its_own() -> None:
    assert partition([1, 1, 9, 1, 1], 0, 0, 3) == (range(0, 2), range(2, 3), range(3, 5))


def test_hundreds_of_layers_are_cut_as_well() -> None:
    rng = random.Random(7)
    block = [rng.uniform(1, 2) for _ in range(512)]
    ranges = partition(block, 1, 50, 256)
    assert len(ranges) == 256
    assert len(ranges[-1]) == 1


@pytest.mark.parametrize(
    ("block", "count"), [([1.0], 2), ([], 1), ([1.0], 0), ([float("nan"), 1.0], 1), ([-1.0, 1.0], 1)]
)
def test_what_cannot_be_cut_is_refused(block: list[float], count: int) -> None:
    with pytest.raises(SpecError):
        partition(block, 0.0, 0.0, count)
