"""Stages compute what the whole plain model computes, bit for bit in the backward halves."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from reference_llama import Reference, summed_loss

from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.split import Tape, note_embedding
from shoal.training.model.stage import StageModel
from shoal.training.spec import RunSpec

torch.set_num_threads(1)


def small(**model: object) -> RunSpec:
    shape = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "feedforward": 48, "sequence": 16}
    stages = {"count": 1} if model.get("tie_embeddings") else {"count": 2}
    return RunSpec.model_validate({"model": {**shape, **model}, "stages": stages})


def tokens(spec: RunSpec, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, spec.data.vocabulary, (3, spec.model.sequence + 1), generator=generator)


@pytest.mark.parametrize("cuts", [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4)])
def test_stages_in_a_row_equal_the_plain_model(cuts: tuple[int, ...]) -> None:
    spec = small()
    layouts = [stage_layout(spec, range(a, b)) for a, b in itertools.pairwise(cuts)]
    flats = [genesis(spec, layout) for layout in layouts]
    reference = Reference(spec)
    reference.load(zip(layouts, flats, strict=True))
    ids = tokens(spec)
    expected = reference(ids[:, :-1])
    hidden = None
    for layout, flat in zip(layouts, flats, strict=True):
        model = StageModel(spec, layout)
        hidden = model.embed(flat, ids[:, :-1]) if hidden is None else hidden
        hidden = model.blocks(flat, hidden, None)
    assert hidden is not None
    torch.testing.assert_close(model.logits(flat, hidden, None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tied", "bias"), [(False, False), (True, False), (False, True)])
def test_split_backward_equals_autograd(tied: bool, bias: bool) -> None:
    spec = small(tie_embeddings=tied, qkv_bias=bias)
    layout = stage_layout(spec, range(4))
    flat = genesis(spec, layout)
    flat[layout.decayed :] += 0.1 * torch.arange(layout.size - layout.decayed).sin()  # norms, biases
    model, tape, ids = StageModel(spec, layout), Tape(), tokens(spec)
    inputs = model.embed(flat, ids[:, :-1]).requires_grad_()
    loss = model.loss(flat, model.blocks(flat, inputs, tape), ids[:, 1:], tape)
    (gradient,) = torch.autograd.grad(loss, inputs)
    embedding = layout.slots[0]
    note_embedding(tape, embedding.start, embedding.count, ids[:, :-1], gradient)
    assert tape.held_bytes > 0
    split = torch.zeros(layout.size)
    tape.apply(split)
    whole = flat.clone().requires_grad_()
    hidden = model.blocks(whole, model.embed(whole, ids[:, :-1]), None)
    torch.autograd.backward(model.loss(whole, hidden, ids[:, 1:], None))
    assert whole.grad is not None
    if tied:  # two sums into one place: the order differs
        torch.testing.assert_close(split, whole.grad, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(split, whole.grad)
    reference = Reference(spec)
    reference.load([(layout, flat)])
    torch.autograd.backward(summed_loss(reference(ids[:, :-1]), ids[:, 1:]))
    torch.testing.assert_close(split, reference.gradients(layout), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_weight_gradients_that_are_never_taken_leave_memory(bias: bool) -> None:
    """A driver vanished: what its micro-batches left on tapes, and the weights they saw, go."""
    spec = small(qkv_bias=bias)
    layout = stage_layout(spec, range(4))
    model, tape, ids = StageModel(spec, layout), Tape(), tokens(spec)
    values = genesis(spec, layout).numpy()
    flat = torch.from_numpy(values)  # `values` lives as long as any view of it
    inputs = model.embed(flat, ids[:, :-1]).requires_grad_()
    loss = model.loss(flat, model.blocks(flat, inputs, tape), ids[:, 1:], tape)
    torch.autograd.grad(loss, inputs)
    assert tape.held_bytes > 0
    version, dropped = weakref.ref(values), weakref.ref(tape)
    notes = tape
    del inputs, loss, flat, values, tape
    gc.collect()
    assert version() is None, "the tape holds on to the weights"
    del notes
    gc.collect()
    assert dropped() is None, "a ring through autograd holds the tape"


def test_genesis_depends_on_seed_and_name_alone() -> None:
    spec = small()
    whole, half = stage_layout(spec, range(4)), stage_layout(spec, range(2, 4))
    flat, part = genesis(spec, whole), genesis(spec, half)
    by_name = {slot.name: slot.view(flat) for slot in whole.slots}
    for slot in half.slots:
        assert torch.equal(slot.view(part), by_name[slot.name]), slot.name
    other = genesis(spec.model_copy(update={"run": spec.run.model_copy(update={"seed": 2})}), whole)
    assert not torch.equal(other, flat)


def test_tied_embeddings_are_refused_across_stages() -> None:
    with pytest.raises(ValueError, match="tie_embeddings"):
        RunSpec.model_validate({"model": {"tie_embeddings": True}, "stages": {"count": 2}})
