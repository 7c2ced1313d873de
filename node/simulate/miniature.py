"""A run in miniature: the same stages, steps, rounds and limits, with tensors that cost no time.

Compute takes its declared duration on the lane; what crosses the network counts as the bytes that the real
run would send (`DrawnNetwork`). Everything else is the real code on a small model.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.training.model.layout import stage_layout
from shoal.training.partition import layer_costs, stage_costs, stage_ranges
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec

_WIDTH = 8
_SEQUENCE = 8
_FEEDFORWARD = 512  # some ten thousand weights a stage: its snapshot goes in several frames
_MOST_PARTS = 16  # of a stage; each costs messages in every round
_LEAST_PART_BYTES = 1024
_OF_WEIGHTS = frozenset({"contribute", "publish", "part", "chunks"})  # methods `outer.STAGE.…`
_OF_ACTIVATIONS = frozenset({"propagate", "infer"})


@dataclass(frozen=True, slots=True)
class Miniature:
    """What the simulated peers run, and what it stands for."""

    spec: RunSpec  # the small one
    costs: tuple[float, ...]  # of a micro-batch at each stage of the real run; their mean is 1
    micro_batch_tokens: int  # of the real run
    stage_bytes: tuple[int, ...]  # a joiner downloads: anchor and momentum, fp32
    activation_factor: float
    weight_factors: tuple[float, ...]  # by stage

    def factor(self, method: str) -> float:
        """How many times more bytes the payload of this method has in the real run."""
        if method.rpartition(".")[2] in _OF_ACTIVATIONS:
            return self.activation_factor
        prefix, _, rest = method.partition(".")
        stage, _, name = rest.partition(".")
        if prefix == "outer" and name in _OF_WEIGHTS:
            return self.weight_factors[int(stage)]
        return 1.0


def miniature(spec: RunSpec) -> Miniature:
    """The run in miniature."""
    ranges = stage_ranges(spec)
    small = _small(spec)
    sizes = [stage.parameters for stage in make_plan(spec).stages]
    small_sizes = [stage_layout(small, layers).size for layers in stage_ranges(small)]
    costs = stage_costs(layer_costs(spec), ranges)
    mean = sum(costs) / len(costs)
    return Miniature(
        spec=small,
        costs=tuple(cost / mean for cost in costs),
        micro_batch_tokens=spec.micro_batch_tokens,
        stage_bytes=tuple(8 * size for size in sizes),
        activation_factor=_micro_batch_bytes(spec) / _micro_batch_bytes(small),
        weight_factors=tuple(real / size for real, size in zip(sizes, small_sizes, strict=True)),
    )


def _small(spec: RunSpec) -> RunSpec:
    def tokens(count: int) -> int:
        return max(1, count * _SEQUENCE // spec.micro_batch_tokens)

    micro_batches = -(-spec.inner.inner_tokens // spec.micro_batch_tokens)
    parts = max(stage.parts for stage in make_plan(spec).stages)
    stages = spec.stages.count
    values = spec.model_dump()
    values["model"] |= {
        "layers": stages,
        "width": _WIDTH,
        "heads": 1,
        "kv_heads": 1,
        "feedforward": _FEEDFORWARD,
        "sequence": _SEQUENCE,
        "tie_embeddings": False,
    }
    values["data"] = {}
    # Nobody has a disk: a lost stage begins anew, and the outcome counts that.
    values["stages"] |= {"first_layers": (), "when_lost": "identity"}
    values["inner"] |= {
        "micro_batch_sequences": 1,
        "inner_tokens": micro_batches * _SEQUENCE,
        "warmup_tokens": tokens(spec.inner.warmup_tokens),
        "total_tokens": tokens(spec.inner.total_tokens),
    }
    part_bytes = 4 * 3 * _WIDTH * _FEEDFORWARD // min(parts, _MOST_PARTS)
    values["outer"] |= {"part_bytes": max(_LEAST_PART_BYTES, part_bytes)}
    values["checkpoint"] |= {"start": ""}
    return RunSpec.model_validate(values)


def _micro_batch_bytes(spec: RunSpec) -> int:
    form, sequences = PayloadFormat.of(spec), spec.inner.micro_batch_sequences
    return form.token_bytes(sequences) + form.hidden_bytes(sequences, form.widest)
