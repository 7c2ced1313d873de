"""The specs that `shoal init --template` starts from. Shapes follow Llama; `spec_file` writes them as TOML.

Every template trains on bytes of the standard library, so that it runs as written; the comments in the file
say how to set a tokenizer and a corpus. Parameters: tiny 0.85M, small 11M, 125m 125M, 1b 974M.
"""

from __future__ import annotations

from shoal.training.spec import (
    CheckpointSection,
    CompressionSection,
    InnerSection,
    LimitsSection,
    ModelSection,
    OuterSection,
    RunSection,
    RunSpec,
    StagesSection,
)

# Below 2.2 nats a byte within two minutes on two CPU cores. A step on every micro-batch: two replicas reach
# 2.2 after 0.33M tokens of both (1.77 after 0.9M), with 4096 tokens a step only after 1.2M.
_TINY = RunSpec(
    run=RunSection(name="tiny"),
    # One in flight: with a step on every micro-batch, two mean gradients a step older. Held-out nats:
    # 2.32 after 0.35M tokens with one, 2.69 after 0.43M with two.
    inner=InnerSection(inner_tokens=1024, in_flight=1),
    outer=OuterSection(inner_steps=20),
)

# Ten times tiny: a pipeline's compute outweighs its messages, still trainable on a few CPUs.
_SMALL = RunSpec(
    run=RunSection(name="small"),
    model=ModelSection(layers=8, width=320, heads=10, kv_heads=5, feedforward=1088, sequence=256),
    inner=InnerSection(
        micro_batch_sequences=4,
        inner_tokens=8192,
        learning_rate=1e-3,
        warmup_tokens=500_000,
        total_tokens=200_000_000,
    ),
    outer=OuterSection(inner_steps=20, round_deadline_s=20.0),
)

# Deep and narrow (MobileLLM, arXiv 2402.14905): better at this size, and its hops are small.
_125M = RunSpec(
    run=RunSection(name="125m"),
    model=ModelSection(
        layers=16, width=768, heads=12, kv_heads=4, feedforward=2688, sequence=1024, dtype="bfloat16"
    ),
    stages=StagesSection(count=4),
    inner=InnerSection(
        micro_batch_sequences=4,
        inner_tokens=65_536,
        learning_rate=6e-4,
        warmup_tokens=20_000_000,
        total_tokens=2_500_000_000,
        in_flight=8,
    ),
    outer=OuterSection(inner_steps=50, fragments=4, round_deadline_s=30.0, payload_budget_bytes=1 << 30),
    compression=CompressionSection(activations="bfloat16"),
    checkpoint=CheckpointSection(every_s=1800.0),  # 2 GB of all stages each time
)

# The shape of Llama 3.2 1B; outer rates as in DiLoCo (arXiv 2311.08105) and INTELLECT-1 (H 100).
_1B = RunSpec(
    run=RunSection(name="1b"),
    model=ModelSection(
        layers=16,
        width=2048,
        heads=32,
        kv_heads=8,
        feedforward=8192,
        sequence=2048,
        rope_theta=500_000.0,
        dtype="bfloat16",
    ),
    stages=StagesSection(count=4, minimum_replicas=2),
    inner=InnerSection(
        micro_batch_sequences=2,
        inner_tokens=131_072,
        learning_rate=3e-4,
        warmup_tokens=200_000_000,
        total_tokens=20_000_000_000,
        in_flight=8,
    ),
    outer=OuterSection(
        inner_steps=100,
        momentum=0.9,
        fragments=8,
        round_deadline_s=120.0,
        payload_budget_bytes=2 << 30,
    ),
    compression=CompressionSection(activations="bfloat16"),
    checkpoint=CheckpointSection(every_s=7200.0),  # 16 GB
    limits=LimitsSection(undecided_ttl_s=120.0, hop_timeout_s=120.0),
)

TEMPLATES: dict[str, RunSpec] = {"tiny": _TINY, "small": _SMALL, "125m": _125M, "1b": _1B}
