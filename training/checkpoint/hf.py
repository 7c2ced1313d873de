"""The Hugging Face layout of Llama and Qwen2: what our parameters and the spec's model are called there.

Pure. Matrices and rotary halves lie as in `transformers`' Llama, so nothing is permuted or transposed: only
names change. Qwen2 is Llama with biases of queries, keys and values. `hf_export` and `hf_import` do the
reading and writing.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from shoal.protocol.errors import UsageError
from shoal.training.model.layout import EMBEDDING, FINAL_NORM, HEAD
from shoal.training.spec import ModelSection, RunSpec

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_ENDS = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    HEAD: "lm_head.weight",
}
_IN_LAYER = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_bias": "self_attn.q_proj",
    "attention.k_bias": "self_attn.k_proj",
    "attention.v_bias": "self_attn.v_proj",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
}
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_PLAIN: dict[str, dict[str, object]] = {  # what of each architecture is supported
    "llama": {**_UNBIASED, "hidden_act": "silu"},
    "qwen2": {"use_sliding_window": False, "hidden_act": "silu"},
}
_LARGEST_THETA = 1e30
_SHORTEST_SEQUENCE = 8
_LONGEST_SEQUENCE = 2048  # of a run that starts from a model which could take more; run.toml can say more


def their_name(parameter: str) -> str:
    """`layers.7.attention.q` -> `model.layers.7.self_attn.q_proj.weight`."""
    if parameter in _ENDS:
        return _ENDS[parameter]
    _, layer, part = parameter.split(".", 2)
    return f"model.layers.{layer}.{_IN_LAYER[part]}.{'bias' if part.endswith('bias') else 'weight'}"


def config_of(spec: RunSpec, end_of_document: int | None, dtype: str) -> dict[str, Any]:
    """config.json of a run's model."""
    model = spec.model
    return {
        "architectures": ["Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if model.qkv_bias else "llama",
        "hidden_size": model.width,
        "intermediate_size": model.feedforward,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width // model.heads,
        "vocab_size": spec.data.vocabulary,
        "max_position_embeddings": model.sequence,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        **({"use_sliding_window": False} if model.qkv_bias else _UNBIASED),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def model_of(config: object, where: str) -> tuple[dict[str, Any], int]:
    """The spec's model section, and the vocabulary. Raises UsageError for what is neither Llama nor Qwen2."""
    if not isinstance(config, dict):
        raise UsageError(f"{where} is not the configuration of a model")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _PLAIN:
        raise UsageError(
            f"{where}: model_type {json.dumps(kind)[:60]} cannot be imported\nthese can: {', '.join(_PLAIN)}"
        )
    if missing := [key for key in _NEEDED if not isinstance(config.get(key), int)]:
        raise UsageError(f"{where} does not say {missing[0]}")
    for key, plain in _PLAIN[kind].items():
        if config.get(key, plain) != plain:
            found = json.dumps(config[key])[:60]
            raise UsageError(f"{where}: {key} = {found} is not supported, only {json.dumps(plain)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_size = config.get("head_dim") or width // max(heads, 1)
    if not isinstance(head_size, int) or head_size * max(heads, 1) != width:
        raise UsageError(
            f"{where}: {heads} heads of {head_size} do not make a width of {width}; not supported"
        )
    values = {
        "layers": config["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "feedforward": config["intermediate_size"],
        "rope_theta": _rope_theta(config, where),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "qkv_bias": kind == "qwen2",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    try:
        model = ModelSection.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UsageError(f"{where}: no run can have it: {first['loc']}: {first['msg']}") from None
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < _SHORTEST_SEQUENCE:
        longest = _LONGEST_SEQUENCE
    sequence = min(longest, _LONGEST_SEQUENCE)
    return model.model_dump() | {"sequence": sequence}, config["vocab_size"]


def _rope_theta(config: dict[str, Any], where: str) -> float:
    """Plain rotary positions, as versions 4 and 5 of transformers write them."""
    for key in ("rope_scaling", "rope_parameters"):
        said = config.get(key) or {}
        kind = said.get("rope_type", said.get("type", "default")) if isinstance(said, dict) else "unknown"
        if kind != "default":
            raise UsageError(
                f"{where}: {key} of type {json.dumps(kind)[:60]} is not supported, "
                "only plain rotary positions"
            )
    said = config.get("rope_parameters") or {}
    theta = said.get("rope_theta", config.get("rope_theta", 10_000.0))
    if not isinstance(theta, int | float) or abs(theta) > _LARGEST_THETA:
        raise UsageError(f"{where}: rope_theta is no number that a model can have")
    return float(theta)
