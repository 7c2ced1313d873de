"""What follows from a spec, as numbers: parameters, memory, bytes on the network. Pure.

`shoal plan` prints it, a peer shows it before it works, and checks its memory against a stage's total.
Weights of a stage lie in one flat vector (`model.layout`); how memory and bytes are counted is said at each
field. Activations are an estimate, everything else is exact.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from shoal.training.activation import VALUE_BYTES, activation_bytes
from shoal.training.model.layout import stage_layout
from shoal.training.outer.codecs import codec_of, usual_codecs
from shoal.training.outer.parts import cut
from shoal.training.partition import layer_costs, stage_costs, stage_ranges
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.serving.form import INT8, served_bytes
from shoal.training.serving.versions import KEPT
from shoal.training.spec import RunSpec


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes one replica of a stage needs."""

    master: int  # float32 weights
    versions: int  # two sets of compute weights, while micro-batches of the older are under way
    gradient: int  # float32 sum
    optimizer: int  # AdamW's two moments
    anchor: int  # float32, of the last round
    outer_momentum: int
    serving: int  # the anchors that inference is served from, current and previous, in float32; and in int8
    round: int  # a copy of a fragment's weights and its contribution, encoded
    residuals: int  # float32, of contributions and at most as much of means; below 8 bits only
    activations: int  # of `inner.in_flight` micro-batches

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def on_device(self, host_optimizer: bool) -> int:
        """What of it lies in a GPU's own memory; anchors and all that rounds need are the machine's."""
        trained = self.versions + self.gradient + self.activations + self.serving
        return trained if host_optimizer else trained + self.master + self.optimizer


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage, seen from one replica of it."""

    stage: int
    layers: range
    parameters: int
    compute_share: float  # of the model's compute; the largest one sets the pace
    memory: StageMemory
    hop_forward_bytes: int  # to the next stage for a micro-batch, in the widest codec; 0 at the last
    hop_backward_bytes: int  # back from it: the gradient of the activations
    parts: int
    fragments: int  # a round moves one of them
    contribution_bytes: int  # all parts, encoded for their owners, after the warm-up
    published_bytes: int  # all parts, encoded means

    def round_bytes(self, replicas: int) -> int:
        """Bytes up, and as many down, of one replica in a round of a group of this size.

        It sends its contribution to the owners of the parts that are not its own, and the mean of its own
        parts to each of the others; parts are shared out evenly here, by uplink in a real round.
        """
        sent = (self.contribution_bytes + self.published_bytes) // self.fragments
        return sent * (replicas - 1) // max(replicas, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole run."""

    run_id: bytes
    parameters: int
    stages: tuple[StagePlan, ...]
    micro_batch_tokens: int
    micro_batches_per_inner_step: int
    inner_step_tokens: int  # of one replica; whole micro-batches
    round_tokens: int  # of one replica

    @property
    def slowest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.compute_share)

    @property
    def bytes_per_token(self) -> float:
        """Over all hops of the pipeline, both ways."""
        hops = sum(stage.hop_forward_bytes + stage.hop_backward_bytes for stage in self.stages)
        return hops / self.micro_batch_tokens


def make_plan(spec: RunSpec) -> Plan:
    """The plan of a run."""
    ranges = stage_ranges(spec)
    costs = stage_costs(layer_costs(spec), ranges)
    stages = tuple(
        _stage(spec, stage, layers, cost / sum(costs))
        for stage, (layers, cost) in enumerate(zip(ranges, costs, strict=True))
    )
    micro_batches = math.ceil(spec.inner.inner_tokens / spec.micro_batch_tokens)
    step_tokens = micro_batches * spec.micro_batch_tokens
    return Plan(
        run_id=spec.run_id(),
        parameters=sum(stage.parameters for stage in stages),
        stages=stages,
        micro_batch_tokens=spec.micro_batch_tokens,
        micro_batches_per_inner_step=micro_batches,
        inner_step_tokens=step_tokens,
        round_tokens=step_tokens * spec.outer.inner_steps,
    )


def stage_parameters(spec: RunSpec, layers: range) -> int:
    """Weights of the stage that holds `layers`, with embedding or head where it is an end."""
    model, vocabulary = spec.model, spec.data.vocabulary
    key_width = model.kv_heads * (model.width // model.heads)
    attention = 2 * model.width * model.width + 2 * model.width * key_width
    block = attention + 3 * model.width * model.feedforward + 2 * model.width  # and two norms
    block += model.width + 2 * key_width if model.qkv_bias else 0
    count = block * len(layers)
    if layers.start == 0:
        count += vocabulary * model.width
    if layers.stop == model.layers:
        count += model.width + (0 if model.tie_embeddings else vocabulary * model.width)
    return count


def _stage(spec: RunSpec, stage: int, layers: range, compute_share: float) -> StagePlan:
    parameters = stage_parameters(spec, layers)
    outer, codecs = spec.outer, spec.compression
    fragments = cut(parameters, outer.part_bytes, codecs.block, outer.fragments)
    parts = [part for fragment in fragments for part in fragment.parts]
    last = layers.stop == spec.model.layers
    form, sequences = PayloadFormat.of(spec), spec.inner.micro_batch_sequences
    hidden, tokens = form.hidden_bytes(sequences, form.widest), form.token_bytes(sequences)
    contribution, published = (
        sum(codec_of(tag).encoded_bytes(part.count) for part in parts) for tag in usual_codecs(codecs)
    )
    return StagePlan(
        stage=stage,
        layers=layers,
        parameters=parameters,
        compute_share=compute_share,
        memory=_memory(spec, layers, parameters, -(-contribution // len(fragments))),
        hop_forward_bytes=0 if last else tokens + hidden,
        hop_backward_bytes=0 if last else hidden,
        parts=len(parts),
        fragments=len(fragments),
        contribution_bytes=contribution,
        published_bytes=published,
    )


def _memory(spec: RunSpec, layers: range, parameters: int, contribution_bytes: int) -> StageMemory:
    full, typed = 4 * parameters, parameters * VALUE_BYTES[spec.model.dtype]
    if not spec.trains:  # the one version that is served, and its largest parameter in float32 as it is read
        largest = 4 * max(slot.count for slot in stage_layout(spec, layers).slots)
        return StageMemory(largest, 0, 0, 0, 0, 0, served_bytes(spec, layers), 0, 0, 0)
    feedback = spec.compression.feedback and any(
        codec_of(tag).needs_feedback for tag in usual_codecs(spec.compression)
    )
    return StageMemory(
        master=full,
        versions=2 * typed,
        gradient=full,
        optimizer=2 * full if spec.inner.optimizer == "adamw" else 0,
        anchor=full,
        outer_momentum=full,
        serving=KEPT * (full + (served_bytes(spec, layers) if spec.model.serving_weights == INT8 else 0)),
        round=full // spec.outer.fragments + contribution_bytes,
        residuals=2 * full if feedback else 0,
        activations=spec.inner.in_flight * activation_bytes(spec, layers),
    )
