"""The plan's numbers are those of the real model and the real wire."""

from __future__ import annotations

import pytest
import torch

from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.split import Tape
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

torch.set_num_threads(1)

SPECS = [
    *TEMPLATES.values(),
    RunSpec.model_validate({"model": {"tie_embeddings": True}, "stages": {"count": 1}}),
    RunSpec.model_validate({"model": {"layers": 7}, "stages": {"count": 3}, "data": {"vocabulary": 5000}}),
    RunSpec.model_validate({"stages": {"count": 1}, "inner": {"optimizer": "sgd"}}),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.run.name)
def test_parameters_are_those_of_the_model(spec: RunSpec) -> None:
    plan = make_plan(spec)
    sizes = [stage_layout(spec, layers).size for layers in stage_ranges(spec)]
    assert [stage.parameters for stage in plan.stages] == sizes
    assert plan.parameters == sum(sizes)


def test_the_templates_have_the_sizes_they_are_named_for() -> None:
    sizes = {name: make_plan(spec).parameters for name, spec in TEMPLATES.items()}
    assert sizes == {
        "tiny": pytest.approx(0.9e6, rel=0.06),
        "small": pytest.approx(11e6, rel=0.01),
        "125m": pytest.approx(125e6, rel=0.01),
        "1b": pytest.approx(1e9, rel=0.03),
    }


@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
def test_a_hop_takes_the_bytes_that_the_pipeline_packs(activations: str) -> None:
    spec = RunSpec.model_validate(
        {"compression": {"activations": activations}, "inner": {"micro_batch_sequences": 2}}
    )
    form = PayloadFormat.of(spec)
    tokens = torch.zeros(2, spec.model.sequence + 1, dtype=torch.int64)
    hidden = torch.zeros(2, spec.model.sequence, spec.model.width)
    first, last = make_plan(spec).stages
    assert first.hop_forward_bytes == form.pack(tokens, hidden, activations).nbytes
    assert first.hop_backward_bytes == form.pack_hidden(hidden, activations).nbytes
    assert last.hop_forward_bytes == last.hop_backward_bytes == 0


def kept_bytes(spec: RunSpec, layers: range) -> int:
    """What autograd really keeps of one micro-batch after its forward."""
    layout = stage_layout(spec, layers)
    flat, model = genesis(spec, layout), StageModel(spec, layout)
    rows, sequence = spec.inner.micro_batch_sequences, spec.model.sequence
    hidden = torch.randn(rows, sequence, spec.model.width, requires_grad=True)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.blocks(flat, hidden, Tape())
        if layout.last:
            output = model.loss(flat, output, torch.zeros(rows, sequence, dtype=torch.int64), Tape())
    storages.pop(flat.untyped_storage().data_ptr(), None)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("vocabulary", [257, 2048])
def test_activation_memory_is_estimated_within_a_tenth(vocabulary: int) -> None:
    spec = RunSpec.model_validate(
        {
            "model": {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "feedforward": 192},
            "data": {"vocabulary": vocabulary},
            "inner": {"micro_batch_sequences": 2, "in_flight": 1},
        }
    )
    for stage in make_plan(spec).stages:
        assert stage.memory.activations == pytest.approx(kept_bytes(spec, stage.layers), rel=0.1)


def test_memory_counts_every_copy_of_the_weights() -> None:
    for dtype, version in (("float32", 4), ("bfloat16", 2)):
        spec = RunSpec.model_validate({"model": {"dtype": dtype}})
        for stage in make_plan(spec).stages:
            memory = stage.memory
            weights = memory.total - memory.activations - memory.round
            assert weights == stage.parameters * (4 + 2 * version + 4 + 8 + 4 + 4 + 2 * 4)


@pytest.mark.parametrize("family", ["float32", "int8"])
def test_a_round_costs_what_its_codec_says(family: str) -> None:
    codecs = {"contribution": family, "published": family}
    stage = make_plan(RunSpec.model_validate({"compression": codecs})).stages[0]
    least = {"float32": 4.0, "int8": 1.0}[family]
    assert least <= stage.contribution_bytes / stage.parameters < 1.03 * least
    assert stage.published_bytes == stage.contribution_bytes


def test_fragments_divide_the_bytes_of_a_round() -> None:
    whole = make_plan(RunSpec()).stages[0]
    quarter = make_plan(RunSpec.model_validate({"outer": {"fragments": 4}})).stages[0]
    assert quarter.fragments == 4
    assert quarter.round_bytes(2) == pytest.approx(whole.round_bytes(2) / 4, rel=0.01)


def test_a_replica_sends_no_part_to_itself() -> None:
    stage = make_plan(RunSpec()).stages[0]
    both = stage.contribution_bytes + stage.published_bytes
    assert stage.round_bytes(1) == 0
    assert stage.round_bytes(2) == both // 2
    assert stage.round_bytes(1000) < both
    assert stage.parts == 24


def test_an_inner_step_takes_whole_micro_batches() -> None:
    plan = make_plan(RunSpec.model_validate({"inner": {"inner_tokens": 2500}}))
    assert plan.micro_batches_per_inner_step == 3
    assert plan.inner_step_tokens == 3 * 8 * 128
    assert plan.round_tokens == 10 * plan.inner_step_tokens


def test_the_slowest_stage_is_named_and_shares_add_up() -> None:
    plan = make_plan(RunSpec.model_validate({"data": {"vocabulary": 50_000}}))
    assert plan.slowest.stage == 1
    assert sum(stage.compute_share for stage in plan.stages) == pytest.approx(1.0)


def test_a_stage_of_many_parts_gets_larger_ones() -> None:
    values = {
        "outer": {"part_bytes": 1024},
        "stages": {"count": 1},
        "model": {"width": 256, "feedforward": 2048},
    }
    assert 2048 < make_plan(RunSpec.model_validate(values)).stages[0].parts <= 4096
