"""Stages with a cache against `transformers`: the same logits, the same greedy text however it is batched."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.training.checkpoint.hf_import import import_hf
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.serving.cache import PAGE, Cache, cache_bytes
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.spec import RunSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

torch.set_num_threads(1)
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 500_000.0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
}


def their_model(kind: str) -> Any:
    """Randomly initialised, biases too, and wide enough apart that no two tokens are nearly as likely."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind]())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2)
    return model.float().eval()


class Stages:
    """A model's stages in a row, in this process."""

    def __init__(self, spec: RunSpec, weights: Sequence[torch.Tensor]) -> None:
        self.stages = [CachedStage(spec, stage_layout(spec, layers)) for layers in stage_ranges(spec)]
        self.weights = weights

    @classmethod
    def of(cls, model: Any, folder: Path, stages: int) -> Stages:
        """Saved by transformers, imported by us."""
        model.save_pretrained(folder / "hf")
        found = import_hf(folder / "hf", folder / "store", stages)
        ranges = stage_ranges(found.spec)
        layouts = [stage_layout(found.spec, layers) for layers in ranges]
        return cls(found.spec, [load_stage(found, found.spec, layout).weights for layout in layouts])

    def caches(self) -> list[Cache]:
        return [stage.cache(flat) for stage, flat in zip(self.stages, self.weights, strict=True)]

    def logits(self, tokens: Sequence[Sequence[int]], caches: list[list[Cache]], at: list[int]) -> Any:
        """One batch: the next tokens of some sessions, which hold `at` positions."""
        rows = torch.tensor(list(itertools.chain(*tokens)))
        for number, (stage, flat) in enumerate(zip(self.stages, self.weights, strict=True)):
            spans = [
                Span(cache[number], start, len(ids))
                for cache, start, ids in zip(caches, at, tokens, strict=True)
            ]
            rows = stage.forward(flat, rows, spans)
        return self.stages[-1].logits(self.weights[-1], rows)

    def write(self, prompts: list[list[int]], count: int, chunk: int) -> list[list[int]]:
        """Greedy text of all prompts in one batch; prompts go in chunks."""
        caches = [self.caches() for _ in prompts]
        waiting, held = [list(prompt) for prompt in prompts], [0] * len(prompts)
        written: list[list[int]] = [[] for _ in prompts]
        while any(len(text) < count for text in written):
            now = [ids[:chunk] for ids in waiting]
            logits = self.logits(now, caches, held)
            ends = itertools.accumulate(len(ids) for ids in now)
            for i, end in enumerate(ends):
                held[i] += len(now[i])
                waiting[i] = waiting[i][chunk:]
                if not waiting[i]:
                    written[i].append(int(logits[end - 1].argmax()))
                    waiting[i] = written[i][-1:]
        return [text[:count] for text in written]


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str, stages: int) -> None:
    model = their_model(kind)
    ours = Stages.of(model, tmp_path, stages)
    tokens = prompts_of(2 * PAGE + 9)[0]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0]
    caches, found = ours.caches(), []
    for start, stop in itertools.pairwise((0, 1, 2, 50, PAGE + 3, len(tokens))):
        found.append(ours.logits([tokens[start:stop]], [caches], [start]))
    assert float((torch.cat(found) - theirs).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_text_of_200_tokens_is_theirs_batched_and_unbatched(tmp_path: Path, kind: str) -> None:
    model = their_model(kind)
    prompts = prompts_of(5, 17, 40)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        expected.append(whole[0, len(prompt) :].tolist())
    ours = Stages.of(model, tmp_path, 2)
    assert ours.write(prompts, 200, chunk=16) == expected
    assert [ours.write([prompt], 200, chunk=64)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("bias", [False, True])
def test_a_cached_row_is_what_the_training_model_gives(bias: bool) -> None:
    spec = RunSpec.model_validate({"model": {"qkv_bias": bias}, "stages": {"count": 2}})
    layouts = [stage_layout(spec, layers) for layers in stage_ranges(spec)]
    flats = [genesis(spec, layout) for layout in layouts]
    for flat, layout in zip(flats, layouts, strict=True):
        flat[layout.decayed :] += 0.1 * torch.randn(
            layout.size - layout.decayed, generator=torch.Generator().manual_seed(2)
        )
    tokens = torch.randint(0, 257, (1, 90), generator=torch.Generator().manual_seed(1))
    hidden = StageModel(spec, layouts[0]).embed(flats[0], tokens)
    for layout, flat in zip(layouts, flats, strict=True):
        hidden = StageModel(spec, layout).blocks(flat, hidden, None)
    expected = StageModel(spec, layouts[1]).logits(flats[1], hidden, None)[0]
    stages = Stages(spec, flats)
    caches = stages.caches()
    found = [
        stages.logits([tokens[0, a:b].tolist()], [caches], [a])
        for a, b in itertools.pairwise((0, 70, 71, 90))
    ]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_takes_what_admission_counts() -> None:
    spec = RunSpec()
    stage = CachedStage(spec, stage_layout(spec, stage_ranges(spec)[0]))
    flat = genesis(spec, stage.layout)
    cache = stage.cache(flat)
    stage.forward(flat, torch.zeros(PAGE + 1, dtype=torch.int64), [Span(cache, 0, PAGE + 1)])
    held = sum(page.numel() * page.element_size() for pages in cache._pages for page in pages)
    assert held == cache_bytes(spec, stage.layout.layers, PAGE + 1, flat.dtype)
    assert held == cache_bytes(spec, stage.layout.layers, 2 * PAGE, flat.dtype)
