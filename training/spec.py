"""RunSpec: everything that defines a run. Hashed; the hash names the run; the owner signs it.

The frozen types and the hash. `spec_file` reads and writes `run.toml` and explains what is wrong in it; the
line under a key here is its comment there. Every key has a default and its unit in its name.
"""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, model_validator

BYTE_VOCABULARY = 257  # 256 bytes and end-of-document
_LARGEST = 2**53  # every JSON reader and the wire's Count hold it exactly

Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # 1 would divide by zero in a bias correction
PathText = Annotated[str, Field(min_length=1, max_length=4096)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=False, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(_Section):
    """Name and seed. The name is for people; the run's identity is the hash of all keys."""

    name: Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9 ._-]+$")] = "shoal"
    """Shown to volunteers. Letters, digits, space, dot, underscore, dash."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Decides the initial weights and the order of the data. Another seed is another run."""


class ModelSection(_Section):
    """Llama architecture: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    layers: Annotated[int, Field(ge=1, le=512)] = 4
    """Transformer blocks. More layers can be cut into more stages."""
    width: Annotated[int, Field(ge=8, le=65536)] = 128
    """Size of the hidden state; heads times an even head size. What crosses the network between two stages
    is proportional to it, so few wide layers ask for faster links than many narrow ones."""
    heads: Positive = 4
    """Attention heads; width / heads is the head size (64 or 128 is usual)."""
    kv_heads: Positive = 2
    """Heads of keys and values; divides heads. Fewer: less memory for inference, slightly worse."""
    feedforward: Annotated[int, Field(ge=1, le=1 << 20)] = 384
    """Inner size of the SwiGLU; about 8/3 of width, more where it should remember more."""
    sequence: Annotated[int, Field(ge=8, le=1 << 20)] = 128
    """Tokens of a training sample. Longer: more context, more memory and activation bytes per sequence."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary positions. 500000 for long sequences."""
    norm_epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Added under the root of RMSNorm."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, as in Qwen2; Llama has none."""
    tie_embeddings: bool = False
    """One matrix for embedding and head. One-stage runs only: the two ends would need one gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of compute; the master weights are float32 always. bfloat16 for CUDA, float32 for most CPUs."""
    serving_weights: Literal["dtype", "int8"] = "dtype"
    """What texts are written with. int8: a byte a weight and a scale for each row, computed with in dtype;
    a quarter of float32's memory, half of bfloat16's, slightly worse texts."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width must be heads times an even head size (width = {self.width}, heads = {self.heads})"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads (heads = {self.heads}, kv_heads = {self.kv_heads})"
            )
        return self


class DataSection(_Section):
    """What is trained on. Every driver reads its own copy; paths are relative to where a peer is started."""

    source: Literal["standard-library", "text", "jsonl", "parquet"] = "standard-library"
    """standard-library: the Python sources on each volunteer's own machine, no download needed."""
    paths: tuple[PathText, ...] = ()
    """Files and globs (** goes into folders) for text, jsonl and parquet."""
    text_field: Annotated[str, Field(min_length=1, max_length=256)] = "text"
    """Name of the field or column that holds the text, for jsonl and parquet."""
    tokenizer: PathText = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json, for instance "tokenizer.json"; set vocabulary to
    its size then (rounded up to a multiple of 64 if you like)."""
    tokenizer_blake3: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """BLAKE3 of tokenizer.json (hexadecimal), so that no peer trains with another one. Empty: not checked."""
    end_of_document: Annotated[str, Field(max_length=256)] = ""
    """The token of tokenizer.json that separates documents. Empty: the usual names are tried."""
    vocabulary: Annotated[int, Field(ge=2, le=1 << 20)] = BYTE_VOCABULARY
    """Rows of embedding and head; at least the tokenizer's size. bytes: 257."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of the text that is never trained on and measures the loss."""

    @model_validator(mode="after")
    def _related(self) -> Self:
        if self.source == "standard-library" and self.paths:
            raise ValueError('source = "standard-library" reads no paths; choose text, jsonl or parquet')
        if self.source != "standard-library" and not self.paths:
            raise ValueError(f'source = "{self.source}" needs paths')
        if self.tokenizer == "bytes" and self.vocabulary < BYTE_VOCABULARY:
            raise ValueError(
                f'tokenizer = "bytes" needs vocabulary {BYTE_VOCABULARY} (vocabulary = {self.vocabulary})'
            )
        return self


class StagesSection(_Section):
    """How the layers are cut."""

    count: Annotated[int, Field(ge=1, le=256)] = 2
    """Stages of the pipeline, at most one per layer. Each peer holds one: more stages fit smaller machines
    and need more peers. 1: every peer holds the whole model (plain DiLoCo)."""
    first_layers: tuple[Annotated[int, Field(ge=0, le=511)], ...] = ()
    """First layer of each stage, for instance [0, 3]. Empty: balanced by cost, embedding and head counted."""
    minimum_replicas: Positive = 1
    """A replica may not move away from a stage that would have fewer."""
    when_lost: Literal["halt", "mean", "identity"] = "halt"
    """A stage of which no peer, disk or checkpoint has a copy any more. halt: wait for one. mean: go on with
    the mean of the neighbours' nearest layers; identity: with layers that change nothing. Both lose it."""
    rebalance_window_s: Annotated[float, Field(ge=0)] = 15.0
    """Peers look so often whether one of them would help more at another stage; a plan has to win two
    windows in a row. 0: peers stay where they are."""


class InnerSection(_Section):
    """The local optimizer of every replica."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has no state and no momentum; it is there for tests."""
    micro_batch_sequences: Annotated[int, Field(ge=1, le=1 << 16)] = 8
    """Sequences of a micro-batch, the unit that goes through the pipeline. More: better use of the device,
    more memory, more bytes per hop."""
    inner_tokens: Positive = 4096
    """Committed tokens of one replica per inner step: its batch size. Fewer: more and noisier steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Highest rate of the inner optimizer. Larger models take lower rates."""
    final_learning_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a share of learning_rate."""
    warmup_tokens: Annotated[int, Field(ge=0, le=_LARGEST)] = 50_000
    """Tokens of the log over which the rate rises from zero."""
    total_tokens: Positive = 10_000_000
    """Tokens of the log at which the cosine ends; training goes on at the final rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices; norm scales are not decayed."""
    beta1: Decay = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Decay = 0.95
    """AdamW's decay of the mean square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's guard against division by zero."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; divided by sqrt(stages.count), for each stage clips its own. 0: no clipping."""
    in_flight: Annotated[int, Field(ge=1, le=256)] = 4
    """Micro-batches of one driver under way at once. More hide slow links and cost memory at every stage."""
    recompute: bool = False
    """Between its forward and its backward a stage keeps the input of a micro-batch alone, and runs the
    forward again: more compute, and hardly any memory for what waits for the stages behind."""
    adopt: bool = True
    """Whoever takes a dead hop's place takes over what the stages behind it have computed for the dead one.
    false: they compute it again, which costs throughput under churn; adopted gradients are of the dead one's
    weights, and teach less the further replicas drift apart between rounds."""
    mode: Literal["stream", "flush", "off"] = "stream"
    """stream never drains the pipeline; flush drains it before every step and is for tests. off: nothing is
    trained, the swarm serves the checkpoint it starts from (shoal serve-model)."""


class OuterSection(_Section):
    """Rounds: replicas of a stage agree on new weights."""

    inner_steps: Positive = 10
    """Inner steps per round, the mean of a group. More: fewer bytes, replicas drift further apart."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.7
    """Of the outer Nesterov step."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of the outer step. 0.5 for 16 to 64 inner steps a round, 0.9 for 100 and more."""
    nesterov: bool = True
    """Nesterov's look-ahead."""
    fragments: Annotated[int, Field(ge=1, le=32)] = 1
    """Slices of a stage that are synchronised in turns, one a round, inner_steps / fragments steps apart.
    More: a smaller burst on the link, more messages. 4 to 8 for slow links."""
    merge: Literal["rebase", "alpha"] = "rebase"
    """What becomes of inner steps made while a round was under way. rebase: all are kept. alpha: Streaming
    DiLoCo's mixture, which gives up a part of them."""
    merge_alpha: Fraction = 0.5
    """With merge = "alpha": the weight of the local weights in the mixture."""
    part_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 4 << 20
    """Largest size of the pieces a stage's float32 weights are cut into for a round, each with an owner."""
    round_deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """A round takes what has arrived by then. At least the bytes of a round (see shoal plan) over the slowest
    uplink that should take part."""
    snapshot_every: Positive = 8
    """Rounds between snapshots on disk; a joiner takes the last one and replays the rounds since."""
    payload_budget_bytes: Positive = 256 << 20
    """Memory for the payloads of past rounds, from which peers that missed some catch up."""


CodecFamily = Literal["auto", "layers", "float32", "bfloat16", "int8", "int4", "onebit", "topk2", "topk8"]


class CompressionSection(_Section):
    """Codecs on the wire."""

    contribution: CodecFamily = "int8"
    """What a replica sends in a round. int8: a quarter of the bytes; int4, onebit (sign and block mean) and
    topk2, topk8 (the largest 1/64) less, with error feedback. auto: by the slowest uplink of the round.
    layers, for both legs: 1, 4 or 8 bits part by part, the fewest bytes that lose no more than int4 would."""
    published: CodecFamily = "int8"
    """What a part's owner sends back. Not topk: a mean of sparse contributions is not sparse."""
    block: Literal[256, 512, 1024] = 256
    """Values that share one scale and offset in int8. Larger: fewer bytes, coarser."""
    entropy: Literal["none", "zlib"] = "none"
    """zlib: codes are packed further, a few per cent, at about a gigabyte a second. For slow links."""
    warmup_rounds: Annotated[int, Field(ge=0, le=_LARGEST)] = 20
    """First rounds that go in int8 where a codec below 8 bits is chosen; about a tenth of all rounds."""
    feedback: bool = True
    """Below 8 bits: what rounding left out goes with the next contribution. false is there for tests."""
    feedback_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of that remainder which is kept from round to round."""
    activations: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Activations and their gradients between stages. bfloat16 halves the bytes of every hop, int8 quarters
    them. auto: hop by hop the widest that the link carries while the device computes."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.contribution == "layers") != (self.published == "layers"):
            raise ValueError("compression.contribution and compression.published are layers both, or neither")
        return self


class CheckpointSection(_Section):
    """What is written to disk to start from again, in `shoal checkpoint`'s form."""

    every_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds between checkpoints: each peer writes its own stage, the owner's peer gathers all stages.
    0: only when somebody asks with shoal checkpoint now."""
    kept: Annotated[int, Field(ge=1, le=10_000)] = 3
    """Checkpoints of a kind that stay on a disk; older ones are removed once a newer one is whole."""
    start: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Digest of the checkpoint that the run starts from; shoal checkpoint import writes it. Empty: random
    weights, drawn from the seed."""


class LimitsSection(_Section):
    """Budgets every peer keeps."""

    undecided_micro_batches: Annotated[int, Field(ge=1, le=4096)] = 64
    """Micro-batches whose activations a replica keeps until they are decided; beyond, it answers busy."""
    undecided_ttl_s: Annotated[float, Field(gt=0)] = 30.0
    """After this long without a decision a micro-batch is dropped and counted."""
    hop_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest time of a micro-batch through the whole chain before it is sent another way."""
    activation_bytes: Annotated[int, Field(ge=0, le=1 << 50)] = 0
    """Most memory of a peer for activations and the gradients that wait for commits; it takes no more
    micro-batches than fit, and answers busy. 0: no cap but undecided_micro_batches and in_flight."""


class RunSpec(_Section):
    """One run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    stages: StagesSection = StagesSection()
    inner: InnerSection = InnerSection()
    outer: OuterSection = OuterSection()
    compression: CompressionSection = CompressionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _related(self) -> Self:
        count, layers, first_layers = self.stages.count, self.model.layers, self.stages.first_layers
        if count > layers:
            raise ValueError(f"stages.count = {count} is more than model.layers = {layers}")
        if self.model.tie_embeddings and count > 1:
            raise ValueError(f"model.tie_embeddings needs stages.count = 1 (stages.count = {count})")
        if first_layers:
            if len(first_layers) != count:
                raise ValueError(
                    f"stages.first_layers names {len(first_layers)} stages, stages.count = {count}"
                )
            rising = all(low < high for low, high in itertools.pairwise(first_layers))
            if first_layers[0] != 0 or first_layers[-1] >= layers or not rising:
                raise ValueError(
                    f"stages.first_layers must start at 0 and rise, below model.layers = {layers}"
                    f" (first_layers = {list(first_layers)})"
                )
        return self

    def canonical(self) -> bytes:
        """The bytes that are hashed and signed: JSON, sorted keys, no spaces."""
        data = self.model_dump(mode="json")
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    def run_id(self) -> bytes:
        """BLAKE3 of the canonical bytes, 32 bytes."""
        return blake3(self.canonical()).digest()

    @property
    def trains(self) -> bool:
        """Whether its peers train, or only serve."""
        return self.inner.mode != "off"

    @property
    def micro_batch_tokens(self) -> int:
        return self.inner.micro_batch_sequences * self.model.sequence
