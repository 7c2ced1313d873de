"""Backward in two halves: input gradients now, weight gradients when the micro-batch is committed.

During the backward pass each parametric operation returns the gradient of its input and leaves a note on
the micro-batch's `Tape`; `Tape.apply` turns the notes into weight gradients later. The sums are the ones
autograd would form, so the gradients are bit-identical to those of a whole backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

Note = Callable[[torch.Tensor], None]


class Tape:
    """Weight gradients still to be computed for one micro-batch; each is added once.

    Notes hold no tensor of the graph: its nodes know the tape, and a ring through autograd is not collected,
    so a micro-batch that is dropped would stay in memory for good.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[int, Callable[[torch.Tensor], None], int]] = []
        self.held_bytes = 0

    def note(self, start: int, count: int, add: Note, *kept: torch.Tensor) -> None:
        """`add(slice)` will add a gradient to flat[start:start+count]; `kept` is what it holds on to."""
        self._notes.append((start, add, count))
        self.held_bytes += sum(t.numel() * t.element_size() for t in kept)

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, start: int) -> torch.Tensor:
        """inputs [..., n] times weight [m, n] transposed, which lies at `start` in the flat vector."""
        result: torch.Tensor = _Linear.apply(inputs, weight, start, self)  # type: ignore[no-untyped-call]
        return result

    def beside(self, product: torch.Tensor, inputs: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """What a product of weights flat[start:start+count] that never change becomes."""
        return product

    def scale(self, inputs: torch.Tensor, factor: torch.Tensor, start: int) -> torch.Tensor:
        """See the function."""
        result: torch.Tensor = _Scale.apply(inputs, factor, start, self)  # type: ignore[no-untyped-call]
        return result

    def shift(self, inputs: torch.Tensor, bias: torch.Tensor, start: int) -> torch.Tensor:
        """See the function."""
        result: torch.Tensor = _Shift.apply(inputs, bias, start, self)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def apply(self, gradient: torch.Tensor) -> None:
        """Add every noted gradient to the stage's flat fp32 gradient, and let go of the activations."""
        self.apply_within(gradient, 0)
        self.held_bytes = 0

    @torch.no_grad()
    def apply_within(self, gradient: torch.Tensor, first: int) -> None:
        """The same for those notes alone that lie in `gradient`, whose beginning is flat[first]."""
        notes, self._notes = self._notes, []
        for note in notes:
            start, add, count = note
            if first <= start < first + gradient.numel():
                add(gradient[start - first : start - first + count])
            else:
                self._notes.append(note)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, start: int, tape: Tape) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.start, ctx.tape = start, tape
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (output_gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        shape = weight.shape  # not the weights: the version they are of would stay with the note
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        output_rows = output_gradient.reshape(-1, output_gradient.shape[-1])

        def add(target: torch.Tensor) -> None:
            matrix = target.view(shape)
            if rows.dtype == matrix.dtype:
                matrix.addmm_(output_rows.t(), rows)
            else:
                matrix += output_rows.t() @ rows

        ctx.tape.note(ctx.start, weight.numel(), add, rows, output_rows)
        return output_gradient @ weight, None, None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, scale: torch.Tensor, start: int, tape: Tape) -> torch.Tensor:
        ctx.save_for_backward(inputs, scale)
        ctx.start, ctx.tape = start, tape
        return inputs * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (output_gradient,) = gradients
        inputs, scale = ctx.saved_tensors
        kept = inputs.detach()

        def add(target: torch.Tensor) -> None:
            target += (output_gradient * kept).reshape(-1, target.numel()).sum(0)

        ctx.tape.note(ctx.start, scale.numel(), add, kept, output_gradient)
        return output_gradient * scale, None, None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, bias: torch.Tensor, start: int, tape: Tape) -> torch.Tensor:
        ctx.count, ctx.start, ctx.tape = bias.numel(), start, tape
        return inputs + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (output_gradient,) = gradients

        def add(target: torch.Tensor) -> None:
            target += output_gradient.reshape(-1, target.numel()).sum(0)

        ctx.tape.note(ctx.start, ctx.count, add, output_gradient)
        return output_gradient, None, None, None


def scale(inputs: torch.Tensor, factor: torch.Tensor, start: int, tape: Tape | None) -> torch.Tensor:
    """inputs [..., n] times factor [n], elementwise."""
    return inputs * factor if tape is None else tape.scale(inputs, factor, start)


def shift(inputs: torch.Tensor, bias: torch.Tensor, start: int, tape: Tape | None) -> torch.Tensor:
    """inputs [..., n] plus bias [n]."""
    return inputs + bias if tape is None else tape.shift(inputs, bias, start)


def note_embedding(tape: Tape, start: int, count: int, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
    """Leave a note for the embedding: gradient [B, T, n] of the rows that tokens [B, T] named."""
    rows = gradient.reshape(-1, gradient.shape[-1])

    def add(target: torch.Tensor) -> None:
        target.view(-1, rows.shape[1]).index_add_(0, tokens.reshape(-1), rows.to(target.dtype))

    tape.note(start, count, add, rows)
