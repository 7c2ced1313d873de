"""Export and import: `transformers` loads what we write and computes the same, and we take what it writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_world import known, layouts, spec_of, write_stages

from shoal.protocol.errors import SpecError, StorageError, UsageError
from shoal.training.checkpoint.hf_export import export
from shoal.training.checkpoint.hf_import import import_checkpoint, import_hf
from shoal.training.checkpoint.read import Checkpoint, verify
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.data.tokenizer import ByteTokenizer
from shoal.training.model.layout import stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.spec import RunSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
THETA = 500_000.0  # not transformers' default


def our_logits(checkpoint: Checkpoint, spec: RunSpec, tokens: torch.Tensor) -> torch.Tensor:
    """By as many stages as the spec has."""
    hidden = torch.empty(0)
    with torch.no_grad():
        for layout in layouts(spec):
            weights, model = load_stage(checkpoint, spec, layout).weights, StageModel(spec, layout)
            hidden = model.embed(weights, tokens) if layout.first else hidden
            hidden = model.blocks(weights, hidden, None)
            if layout.last:
                return model.logits(weights, hidden, None)
    raise AssertionError("no last stage")


def their_model(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves config.json open
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_transformers_loads_an_export_and_gives_the_same_logits(
    tmp_path: Path, stages: int, kv_heads: int
) -> None:
    spec = spec_of(stages, rope_theta=THETA, kv_heads=kv_heads, norm_epsilon=1e-3)
    checkpoint = write_stages(tmp_path / "store", spec)
    export(checkpoint, tmp_path / "hf")
    tokens = torch.randint(0, 257, (2, spec.model.sequence), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = their_model(tmp_path / "hf")(tokens).logits
    assert_same_logits(our_logits(checkpoint, spec, tokens), theirs)


@pytest.mark.parametrize("stages", [1, 2])
def test_biases_make_it_a_qwen2(tmp_path: Path, stages: int) -> None:
    spec = spec_of(stages, qkv_bias=True)
    checkpoint = write_stages(tmp_path / "store", spec)
    export(checkpoint, tmp_path / "hf")
    model = their_model(tmp_path / "hf")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokens = torch.randint(0, 257, (2, spec.model.sequence), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_same_logits(our_logits(checkpoint, spec, tokens), model(tokens).logits)
    imported = import_hf(tmp_path / "hf", tmp_path / "other", stages=4)
    assert imported.spec.model.qkv_bias
    assert torch.equal(our_logits(imported, imported.spec, tokens), our_logits(checkpoint, spec, tokens))


def test_what_was_exported_imports_bit_equal(tmp_path: Path) -> None:
    spec = spec_of(2, rope_theta=THETA)
    checkpoint = write_stages(tmp_path / "store", spec)
    export(checkpoint, tmp_path / "hf", shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    imported = import_hf(tmp_path / "hf", tmp_path / "other", stages=4)
    verify(imported)
    assert imported.spec.data.tokenizer == "bytes"
    assert imported.spec.model.model_dump(exclude={"sequence"}) == spec.model.model_dump(exclude={"sequence"})
    for layout in layouts(spec_of(4)):
        state = load_stage(imported, imported.spec, layout)
        assert torch.equal(state.weights, known(layout, "weights"))
        assert not state.momentum.any()
        assert (state.moments, state.log_tokens, state.positions) == (None, 0, ())


def test_an_import_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    export(write_stages(tmp_path / "store", spec_of(2)), tmp_path / "hf", shard_bytes=30_000)
    with pytest.raises(KeyboardInterrupt):
        import_hf(tmp_path / "hf", tmp_path / "other", stages=4, progress=interrupted)
    assert not list((tmp_path / "other").iterdir())


def test_sharded_exports_load_too(tmp_path: Path) -> None:
    spec = spec_of(2)
    checkpoint = write_stages(tmp_path / "store", spec)
    export(checkpoint, tmp_path / "hf", shard_bytes=30_000)
    tokens = torch.arange(16).repeat(1, 1)
    with torch.no_grad():
        theirs = their_model(tmp_path / "hf")(tokens).logits
    assert_same_logits(our_logits(checkpoint, spec, tokens), theirs)


def test_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    spec = spec_of(1)
    export(write_stages(tmp_path / "store", spec), tmp_path / "hf", torch.bfloat16)
    found = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    layout = layouts(spec)[0]
    expected = layout.slots[0].view(known(layout, "weights")).to(torch.bfloat16)
    assert torch.equal(found["model.embed_tokens.weight"], expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_their_tokenizer_reads_bytes_as_ours_does(tmp_path: Path) -> None:
    export(write_stages(tmp_path / "store", spec_of(1)), tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def f(x):\n\treturn 'né' + \"\U0001f41f\"  # \x00\x7f"
    assert tokenizer(text).input_ids == ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == ByteTokenizer.end_of_document


def their_folder(folder: Path, **changes: object) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("tied", "stages"), [(False, 2), (True, 1), (True, 2)])
def test_an_import_of_theirs_gives_their_logits(tmp_path: Path, tied: bool, stages: int) -> None:
    folder = their_folder(tmp_path / "hf", tie_word_embeddings=tied, rope_theta=THETA)
    imported = import_hf(folder, tmp_path / "store", stages)
    assert imported.spec.model.tie_embeddings == (tied and stages == 1)
    tokens = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = their_model(folder)(tokens).logits
    assert_same_logits(our_logits(imported, imported.spec, tokens), theirs)


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return apply


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 10**5)


def _index(weight_map: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def _no_text(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")


def _twice(folder: Path) -> None:
    other = {"model.norm.weight": torch.zeros(32)}
    safetensors.torch.save_file(other, folder / "other.safetensors")
    _index({"model.norm.weight": "model.safetensors", "lm_head.weight": "other.safetensors"})(folder)


def _elsewhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../secrets.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another architecture": (_config(model_type="mixtral"), 'model_type "mixtral"'),
    "biases": (_config(attention_bias=True), "attention_bias = true"),
    "a sliding window": (
        _config(model_type="qwen2", use_sliding_window=True),
        "use_sliding_window = true",
    ),
    "another activation": (_config(hidden_act="gelu"), 'hidden_act = "gelu"'),
    "scaled rotary positions": (_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), '"llama3"'),
    "heads of their own size": (_config(head_dim=16), "4 heads of 16 do not make a width of 32"),
    "no sizes": (_config(hidden_size=None), "does not say hidden_size"),
    "sizes that cannot be": (_config(num_key_value_heads=3), "heads must be a multiple of kv_heads"),
    "a configuration that is none": (_no_json, "not JSON"),
    "a tensor that is missing": (_tensors(lambda t: t.pop("model.norm.weight")), "has no model.norm.weight"),
    "a tensor too many": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "q_norm.weight', which no plain Llama has",
    ),
    "another shape": (
        _tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight is torch.float32 (31,), not (32,)",
    ),
    "no number": (
        _tensors(lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight has values that are not finite",
    ),
    "pickles": (_pickled, "other formats than safetensors run code"),
    "a size beyond all numbers": (_config(hidden_size=10**400), "heads of"),
    "heads of no size": (_config(head_dim="8"), "4 heads of 8 do not make"),
    "rotary positions beyond all numbers": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 10**400}),
        "rope_theta is no number",
    ),
    "a list of files that is none": (_index(["model.safetensors"]), "names files that are not in the folder"),
    "a file's name that is none": (_index({"a": []}), "names files that are not in the folder"),
    "names that cannot be compared": (_index({"a": 1, "b": "c"}), "names files that are not in the folder"),
    "a name too long": (_index({"a": "x" * 300}), "names files that are not in the folder"),
    "a name that does not print": (_index({"a": "\x1b[2J"}), "names files that are not in the folder"),
    "a tensor in two files": (_twice, "'model.norm.weight' in"),
    "a tokenizer that is a folder": (lambda folder: (folder / "tokenizer.json").mkdir(), "tokenizer.json"),
    "a tokenizer that is no text": (
        _no_text,
        "tokenizer.json is not a tokenizer.json",
    ),
    "files elsewhere": (_elsewhere, "names files that are not in the folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_llama_is_refused_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    folder = their_folder(tmp_path / "hf")
    change, told = REFUSED[kind]
    change(folder)
    with pytest.raises((UsageError, SpecError, StorageError)) as refusal:
        import_hf(folder, tmp_path / "store", 2)
    assert told in str(refusal.value)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())


def test_a_damaged_file_of_theirs_is_refused(tmp_path: Path) -> None:
    folder = their_folder(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be read"):
        import_hf(folder, tmp_path / "store", 2)


def test_an_import_of_ours_keeps_its_digest_or_its_weights_alone(tmp_path: Path) -> None:
    spec = spec_of(2)
    checkpoint = write_stages(tmp_path / "here", spec)
    same = import_checkpoint(checkpoint, tmp_path / "there", weights_only=False)
    assert same.digest == checkpoint.digest
    verify(same)
    bare = import_checkpoint(checkpoint, tmp_path / "there", weights_only=True)
    verify(bare)
    layout = stage_layout(spec, range(4))
    state = load_stage(bare, spec_of(1), layout)
    assert torch.equal(state.weights, known(layout, "weights"))
    assert (state.moments, state.log_tokens, state.positions) == (None, 0, ())


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    checkpoint = write_stages(tmp_path / "store", spec_of(1))
    (tmp_path / "hf").mkdir()
    with pytest.raises(UsageError, match="exists and is left as it is"):
        export(checkpoint, tmp_path / "hf")


def test_some_stages_are_not_exported(tmp_path: Path) -> None:
    part = write_stages(tmp_path, spec_of(2), "stage-0", range(1))
    with pytest.raises(UsageError, match="holds only some of the stages"):
        export(part, tmp_path / "hf")
