"""RunSpec: everything that defines a run. Hashed; the hash names the run; the owner signs it.

The frozen types and the hash. `spec_file` reads and writes `run.toml` and explains what is wrong in it.
Every key has a default and its unit in its name.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class RunSection(_Section):
    """Name and seed. The name is for people; identity is the hash."""

    name: Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9 ._-]+$")] = "shoal"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1


class ModelSection(_Section):
    """Llama architecture."""

    layers: Annotated[int, Field(ge=1, le=512)] = 4
    width: Annotated[int, Field(ge=8, le=65536)] = 128
    heads: Positive = 4
    kv_heads: Positive = 2  # grouped-query attention when below heads
    feedforward: Positive = 384
    sequence: Annotated[int, Field(ge=8, le=1 << 20)] = 128
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    tie_embeddings: bool = False  # one-stage runs only: the two ends would need one gradient
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; bfloat16 on CUDA

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError("width must be heads times an even head size")
        if self.heads % self.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        return self


class DataSection(_Section):
    """What is trained on. `standard-library`: the Python sources on the volunteer's own machine."""

    source: Literal["standard-library", "text", "jsonl", "parquet"] = "standard-library"
    paths: tuple[str, ...] = ()  # files and globs, for text, jsonl and parquet
    text_field: str = "text"  # for jsonl and parquet
    tokenizer: str = "bytes"  # or the path of a Hugging Face tokenizer.json
    vocabulary: Annotated[int, Field(ge=2, le=1 << 20)] = 257  # 256 bytes and end-of-document
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02


class StagesSection(_Section):
    """How the layers are cut."""

    count: Annotated[int, Field(ge=1, le=256)] = 2
    first_layers: tuple[int, ...] = ()  # first layer of each stage; empty: balanced by cost
    minimum_replicas: Positive = 1


class InnerSection(_Section):
    """The local optimizer of every replica."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    micro_batch_sequences: Positive = 8
    inner_tokens: Positive = 4096  # committed tokens of a replica per inner step
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    final_learning_rate_fraction: Fraction = 0.1
    warmup_tokens: Annotated[int, Field(ge=0)] = 50_000  # of the log
    total_tokens: Positive = 10_000_000  # of the log: end of the cosine
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # divided by sqrt(stages); 0: no clipping
    in_flight: Annotated[int, Field(ge=1, le=64)] = 4  # micro-batches of one driver
    mode: Literal["stream", "flush"] = "stream"


class OuterSection(_Section):
    """Rounds. Defaults for short runs: notes/outer-sync.md B.3 item 6 (H 16-64: momentum 0.5)."""

    inner_steps: Positive = 10  # H: mean inner steps of a group's replicas per round
    learning_rate: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    nesterov: bool = True
    part_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 1 << 20  # of fp32 weights
    round_deadline_s: Annotated[float, Field(gt=0)] = 10.0
    snapshot_every: Positive = 8  # heights
    payload_budget_bytes: Positive = 256 << 20  # kept entry payloads


class CompressionSection(_Section):
    """Codecs on the wire."""

    contribution: Literal["int8", "float32"] = "int8"
    published: Literal["int8", "float32"] = "int8"
    block: Literal[256, 512, 1024] = 256
    activations: Literal["float32", "bfloat16"] = "float32"


class LimitsSection(_Section):
    """Budgets every peer keeps."""

    undecided_micro_batches: Annotated[int, Field(ge=1, le=4096)] = 64
    undecided_ttl_s: Annotated[float, Field(gt=0)] = 30.0
    hop_timeout_s: Annotated[float, Field(gt=0)] = 60.0


class RunSpec(_Section):
    """One run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    stages: StagesSection = StagesSection()
    inner: InnerSection = InnerSection()
    outer: OuterSection = OuterSection()
    compression: CompressionSection = CompressionSection()
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.stages.count > self.model.layers:
            raise ValueError(f"{self.stages.count} stages for {self.model.layers} layers")
        if self.model.tie_embeddings and self.stages.count > 1:
            raise ValueError("tie_embeddings needs stages.count = 1")
        return self

    def canonical(self) -> bytes:
        """The bytes that are hashed and signed: JSON, sorted keys, no spaces."""
        data = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    def run_id(self) -> bytes:
        """BLAKE3 of the canonical bytes, 32 bytes."""
        return blake3(self.canonical()).digest()

    @property
    def micro_batch_tokens(self) -> int:
        return self.inner.micro_batch_sequences * self.model.sequence
