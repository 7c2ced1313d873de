"""Copies past the cache: the same values as any copy, nothing beside them touched."""

from __future__ import annotations

import math

import pytest
import torch
from codecs_world import on, same_bits

from shoal.compression import copying
from shoal.compression.codec import CodecError
from shoal.compression.copying import copy, take
from shoal.compression.registry import codec_by_tag
from shoal.training.outer.buffers import Buffers


@pytest.mark.parametrize("path", ["compiled", "portable"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 255, 4096, 5003])
@pytest.mark.parametrize("at", [0, 1, 4, 16])
def test_a_copy_is_a_copy_wherever_it_begins(
    path: str, count: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_LEAST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    source, into = torch.randn(count + 5)[3 : 3 + count], torch.full((count + 48,), -1.0)
    source[0] = torch.nan
    with on(path):
        result = copy(source, into[at : at + count])
    assert same_bits(into[at : at + count], source)
    assert result.data_ptr() == into[at:].data_ptr()
    assert bool((into[:at] == -1.0).all()) and bool((into[at + count :] == -1.0).all())


@pytest.mark.parametrize("path", ["compiled", "portable"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1024, 1040, 5003, 70_000])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_what_is_taken_is_a_copy_and_the_norm_of_the_delta(
    path: str, count: int, carries: bool, at: int
) -> None:
    source, anchor, carried = torch.randn(3, count).unbind()
    into = torch.full((count + 48,), -1.0)
    with on(path):
        square = take(source, into[at : at + count], anchor, carried if carries else None)
    delta = anchor.double() - source.double() + (carried.double() if carries else 0.0)
    assert square == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert same_bits(into[at : at + count], source)
    assert bool((into[:at] == -1.0).all()) and bool((into[at + count :] == -1.0).all())


@pytest.mark.parametrize("path", ["compiled", "portable"])
@pytest.mark.parametrize("place", [0, 1023, 1500, 2999])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_one_value_that_is_no_number_makes_the_norm_none(path: str, place: int, wrong: float) -> None:
    source, anchor = torch.randn(2, 3000).unbind()
    source[place] = wrong
    with on(path):
        assert not math.isfinite(take(source, torch.empty(3000), anchor))


@pytest.mark.parametrize("block", [256, 512, 1024])
@pytest.mark.parametrize("count", [1, 15, 17, 255, 256, 1040, 5003, 70_000])
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_int8_copies_measures_and_encodes_in_one_pass_what_it_does_in_two(
    block: int, count: int, carries: bool, at: int
) -> None:
    source, anchor, carried = torch.randn(3, count).unbind()
    codec, plus, into = (
        codec_by_tag(f"int8/{block}"),
        carried if carries else None,
        torch.full((count + 48,), -1.0),
    )
    with on("compiled"):
        taken = codec.take(source, into[at : at + count], anchor, plus)
        square = take(source, torch.empty(count), anchor, plus)
    assert taken is not None
    with on("portable"):
        assert codec.take(source, torch.empty(count), anchor, plus) is None
        assert bytes(taken[1]) == bytes(codec.encode_difference(anchor, source, plus)[0])
    assert taken[0] == pytest.approx(square, rel=1e-6)
    assert same_bits(into[at : at + count], source)
    assert bool((into[:at] == -1.0).all()) and bool((into[at + count :] == -1.0).all())


@pytest.mark.parametrize("place", [0, 1023, 2999])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 3e38])
def test_what_cannot_be_encoded_is_left_to_the_pass_that_says_so(place: int, wrong: float) -> None:
    source, anchor = torch.randn(2, 3000).unbind()
    source[place], anchor[place] = wrong, -wrong
    codec = codec_by_tag("int8/256")
    with on("compiled"):
        assert codec.take(source, torch.empty(3000), anchor) is None
        with pytest.raises(CodecError):
            codec.encode_difference(anchor, source)


def test_other_types_and_strides_are_copied_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_LEAST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    source = torch.randn(64)
    with on("compiled"):
        assert torch.equal(copy(source, torch.empty(64, dtype=torch.bfloat16)), source.to(torch.bfloat16))
        assert torch.equal(copy(source[::2], torch.empty(32)), source[::2])
        assert torch.equal(copy(source[:32], torch.zeros(64)[::2]), source[:32])


def test_vectors_of_rounds_begin_a_line_of_the_cache() -> None:
    buffers = Buffers()
    assert [buffers.take(count).data_ptr() % 64 for count in (1, 100, 5000, 1 << 20)] == [0] * 4


@pytest.mark.parametrize("at", [0, 1, 16])
def test_a_step_gives_the_same_bits_wherever_its_result_begins(at: int) -> None:
    codec, base, into = codec_by_tag("int8/256"), torch.randn(5003), torch.full((5051,), -1.0)
    encoded = codec.encode(torch.randn(5003))
    with on("portable"):
        codec.subtract_decoded(encoded, base, 0.7, expected := torch.empty(5003))
    with on("compiled"):
        codec.subtract_decoded(encoded, base, 0.7, into[at : at + 5003])
    assert same_bits(into[at : at + 5003], expected)
    assert bool((into[:at] == -1.0).all()) and bool((into[at + 5003 :] == -1.0).all())
