"""What micro-batches keep of a replica's memory, and how many it therefore takes at once. Pure.

`plan` shows it; hops and drivers admit by it, so that `limits.activation_bytes` is never exceeded.
"""

from __future__ import annotations

import math

from shoal.protocol.errors import SpecError
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
MARGIN = 1.1  # on the estimate: a test holds it within a tenth of what autograd keeps


def held_most(spec: RunSpec, stage: int, stages: int = 1) -> int:
    """How many micro-batches a replica of a stage may hold from their forwards to their commits.

    `stages`: that its peer may hold at once; each has an equal part of the memory. One less than fit: what is
    on the lane has its graph and its tape at once for a moment. Raises SpecError if not even one and it fit.
    """
    most, cap = spec.limits.undecided_micro_batches, spec.limits.activation_bytes
    if cap == 0:
        return most
    each = math.ceil(MARGIN * activation_bytes(spec, stage_ranges(spec)[stage]))
    fit = cap // stages // each - 1
    if fit < 1:
        raise SpecError(
            f"limits.activation_bytes = {cap} has no room for two micro-batches at stage {stage}, of {each} "
            f"bytes{f', beside {stages - 1} more stages' if stages > 1 else ''}; raise it, or lower "
            "inner.micro_batch_sequences"
        )
    return min(most, fit)


def activation_bytes(spec: RunSpec, layers: range) -> int:
    """What a micro-batch keeps at a stage from its forward to its commit; an estimate, measured within 5 %.

    Per token and block, from forward to backward: inputs and results of two norms, inputs of q and of gate,
    queries, attention output (eight times width), keys and values before and after rotation, and four times
    the feed-forward width. From backward to commit the tape holds a tenth less: inputs and output gradients
    of each matrix; the answer, kept as long for who may take the caller's place, has room in that. The last
    stage adds its norm and the softmax in float32. Attention keeps no [T, T] matrix.
    """
    model = spec.model
    key_width = model.kv_heads * (model.width // model.heads)
    kept = len(layers) * (8 * model.width + 4 * key_width + 4 * model.feedforward) * VALUE_BYTES[model.dtype]
    if layers.stop == model.layers:
        kept += 3 * model.width * VALUE_BYTES[model.dtype] + 4 * spec.data.vocabulary
    return spec.micro_batch_tokens * kept
