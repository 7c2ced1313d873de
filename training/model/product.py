"""Matrix products where nothing learns.

On a CPU they are oneDNN's. MKL, which `functional.linear` takes for float32 there, is quick for one row and
slow for a few: on an AMD core 2 rows took 2.0 times what one did and 8 rows 2.4 times; oneDNN's 1.1 and 1.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """inputs [..., n] times weight [m, n] transposed; has no gradient."""
    if not _HAS_ONEDNN or inputs.device.type != "cpu" or inputs.dtype is not torch.float32:
        return functional.linear(inputs, weight)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")
    return found


def _has_onednn() -> bool:
    """The operator is torch's own, for what it compiles; who has another torch may be without it."""
    try:
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 1), torch.zeros(1, 1), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


_HAS_ONEDNN = _has_onednn()
