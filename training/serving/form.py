"""In which form weights are served: in the type that is computed with, or in int8 (`model.serving_weights`).

The one place that knows. Texts of the two forms differ, so a version's name tells its form: a session that
began on one is never continued on the other, whatever a server's spec says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from shoal.training.model.int8 import Int8Weights, int8_bytes
from shoal.training.model.layout import Slot, StageLayout, stage_layout
from shoal.training.model.stage import Held
from shoal.training.spec import RunSpec

INT8 = "int8"
Parameters = Iterable[tuple[Slot, torch.Tensor]]  # values fp32, of the slot's shape


@dataclass(frozen=True, slots=True)
class Form:
    """Of one server. `int8`: the stage whose matrices are kept so; None: all is as it is computed with."""

    int8: StageLayout | None = None

    @classmethod
    def of(cls, spec: RunSpec, layout: StageLayout) -> Form:
        """What the run asks for."""
        return cls(layout if spec.model.serving_weights == INT8 else None)

    def name(self, version: bytes) -> bytes:
        """Of these weights in this form."""
        return version if self.int8 is None else blake3(INT8.encode() + version).digest()

    def held(self, pieces: Sequence[Held], dtype: torch.dtype, device: str) -> Held:
        """Of flat weights, one tensor a fragment; what is in this form already stays as it is."""
        if isinstance(pieces[0], Int8Weights):
            return pieces[0]
        flat = [one for one in pieces if isinstance(one, torch.Tensor)]
        whole = flat[0] if len(flat) == 1 else torch.cat(flat)
        if self.int8 is None:
            return whole.to(device, dtype)
        each = ((slot, slot.view(whole)) for slot in self.int8.slots)
        return Int8Weights(self.int8, each, dtype, device)


def load_held(spec: RunSpec, layout: StageLayout, parameters: Parameters, device: str) -> Held:
    """A stage's weights, parameter by parameter: its fp32 vector never exists."""
    dtype: torch.dtype = getattr(torch, spec.model.dtype)
    if Form.of(spec, layout).int8 is not None:
        return Int8Weights(layout, parameters, dtype, device)
    flat = torch.empty(layout.size, dtype=dtype, device=device)
    for slot, values in parameters:
        slot.view(flat).copy_(values)
    return flat


def served_bytes(spec: RunSpec, layers: range) -> int:
    """Memory of one version of a stage."""
    layout, dtype = stage_layout(spec, layers), getattr(torch, spec.model.dtype)
    return dtype.itemsize * layout.size if Form.of(spec, layout).int8 is None else int8_bytes(layout, dtype)
