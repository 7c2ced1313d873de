"""A swarm in the shape that programs written for Transformers know: `generate`, `forward`, adapters.

    from shoal.node.hf import SwarmModelForCausalLM

    with SwarmModelForCausalLM.from_pretrained(join=TOKEN) as model:
        print(model.tokenizer.decode(model.generate(model.encode("def "), max_new_tokens=32)[0].tolist()))
        model.add_adapter(rank=8, target_modules=["q_proj", "v_proj"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        model.save_adapter("my-adapter")      # peft.PeftModel.from_pretrained loads it

The base lies on the servers and stays as it is; the adapter's parameters live here. Needs `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.modeling_outputs import CausalLMOutputWithPast

from shoal.node.inference.adapters import load_adapter, save_adapter, targets_of
from shoal.node.inference.blocking import Client
from shoal.node.inference.writing import Options, Text, Writing
from shoal.protocol.admission import JoinToken
from shoal.protocol.errors import UsageError
from shoal.training.checkpoint.hf import config_of
from shoal.training.data.tokenizer import Tokenizer
from shoal.training.model.lowrank import AdapterForm
from shoal.training.serving.sampling import next_token
from shoal.training.serving.tuner import NO_ADAPTER, Tuner

Wait = Callable[[Coroutine[Any, Any, Any]], Any]


class SwarmModelForCausalLM(torch.nn.Module):
    """See the module. `parameters()` are the adapter's; there are none without one."""

    def __init__(
        self, text: Text, tuner: Tuner, wait: Wait, close: Callable[[], None] = lambda: None
    ) -> None:
        """`wait` runs a coroutine on the loop that `text` and `tuner` live on, and returns its result."""
        super().__init__()
        self._text, self._tuner, self._wait, self._close = text, tuner, wait, close
        self._form = NO_ADAPTER
        self.adapter = torch.nn.ParameterDict()  # dots in names are slashes: torch takes no dots
        spec = text.spec
        kind = Qwen2Config if spec.model.qkv_bias else LlamaConfig
        self.config = kind(**config_of(spec, self.tokenizer.end_of_document, spec.model.dtype))

    @classmethod
    def from_pretrained(
        cls,
        run: str | None = None,
        *,
        join: str | JoinToken,
        data_dir: Path | None = None,
        request_timeout: float | None = None,
    ) -> Self:
        """Join with an inference token. Raises UsageError where the run has another name than `run`."""
        with ExitStack() as stack:
            client = stack.enter_context(Client(join, data_dir=data_dir, timeout_s=request_timeout))
            if run not in (None, client.model):
                raise UsageError(f"this token is for {client.model!r}, not {run!r}")
            return cls(client.text, client.tuner, client.wait, stack.pop_all().close)

    def close(self) -> None:
        """Leave the swarm."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what callers of Transformers look at

    @property
    def device(self) -> torch.device:
        """Where inputs and the adapter are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and logits as they come here."""
        return torch.float32

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own."""
        return self._text.tokenizer

    def encode(self, text: str) -> torch.Tensor:
        """Token ids int64 [1, T]."""
        return torch.from_numpy(self.tokenizer.encode(text)).long()[None]

    # --- adapters

    def add_adapter(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: tuple[str, ...] | list[str] = ("q_proj", "v_proj"),
        prompt_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        """A new LoRA, or soft prompt, or both, held here; the one before goes. Raises UsageError."""
        form = AdapterForm(rank, alpha, targets_of(target_modules) if rank else (), prompt_tokens)
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for layout in self._tuner.layouts:
            tensors |= form.first_values(layout, generator)
        self._take(form, tensors)

    def load_adapter(self, folder: str | Path) -> None:
        """One that was saved here or by PEFT."""
        self._take(*load_adapter(Path(folder), self._tuner.layouts))

    def save_adapter(self, folder: str | Path) -> None:
        """In PEFT's layout. Raises UsageError without a LoRA, StorageError."""
        save_adapter(Path(folder), self._form, self._tensors(), self._text.spec.run.name)

    def _take(self, form: AdapterForm, tensors: dict[str, torch.Tensor]) -> None:
        self._form = form
        self.adapter = torch.nn.ParameterDict(
            {name.replace(".", "/"): torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): parameter for name, parameter in self.adapter.items()}

    # --- forward

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutputWithPast:
        """Loss where there are labels, else logits, and the hidden states between stages if asked for.

        `input_ids` int64 [B, T]; padding on the right needs no mask, since nothing attends to what comes
        after it: set its labels to -100. Gradients reach the adapter. Raises UsageError for padding on the
        left.
        """
        if attention_mask is not None and not bool((attention_mask[:, :1] == 1).all()):
            raise UsageError("rows padded on the left are not taken; pad on the right")
        tokens = input_ids.cpu()
        if labels is not None:
            tensors = self._tensors()
            values = list(tensors.values())
            loss: torch.Tensor = _Loss.apply(self, tokens, labels.cpu(), list(tensors), *values)  # type: ignore[no-untyped-call]
            return CausalLMOutputWithPast(loss=loss)
        answer = self._wait(self._tuner.logits(tokens, self._form, self._tensors()))
        hidden = answer.hidden if output_hidden_states else None
        return CausalLMOutputWithPast(logits=answer.logits, hidden_states=hidden)

    def loss_and_gradients(
        self, tokens: torch.Tensor, labels: torch.Tensor, gradients: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """By way of all stages, there and back."""
        found: tuple[float, dict[str, torch.Tensor]] = self._wait(
            self._tuner.loss(tokens, labels, self._form, self._tensors(), gradients=gradients)
        )
        return found

    # --- generate

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        streamer: Any = None,
    ) -> torch.Tensor:
        """Prompts [B, T] and what follows them, ends filled up with the end of document; int64.

        `streamer` is one of Transformers', for a single prompt. With an adapter every token goes through
        the chain anew, for servers keep caches of the base only.
        """
        if streamer is not None and len(input_ids) != 1:
            raise UsageError("a streamer takes one prompt")
        options = Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature if do_sample else 0.0,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        rows = []
        for prompt in input_ids.tolist():
            if streamer is not None:
                streamer.put(torch.tensor(prompt))
            row = list(prompt)
            for token in self._adapted(prompt, options) if self.adapter else self._written(prompt, options):
                row.append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
            rows.append(row)
        if streamer is not None:
            streamer.end()
        longest, end = max(map(len, rows)), self.tokenizer.end_of_document
        return torch.tensor([row + [end] * (longest - len(row)) for row in rows])

    def _written(self, prompt: list[int], options: Options) -> Iterator[int]:
        """In a session, as all texts are."""
        writing = self._text.writing(prompt, options)
        self._wait(writing.__aenter__())
        try:
            pieces = aiter(writing)
            while (token := self._wait(_next(writing, pieces))) is not None:
                yield token
        finally:
            self._wait(writing.__aexit__(None, None, None))

    def _adapted(self, prompt: list[int], options: Options) -> Iterator[int]:
        row, end = list(prompt), self.tokenizer.end_of_document
        room = self._text.spec.model.sequence - len(prompt) - self._form.prompt
        sampling = options.sampling(end)
        for _ in range(min(options.max_new_tokens, room)):
            answer = self._wait(self._tuner.logits(torch.tensor([row]), self._form, self._tensors()))
            token = next_token(answer.logits[0, -1], row, sampling)
            if token == end:
                return
            row.append(token)
            yield token


class _Loss(torch.autograd.Function):
    """The loss of a batch. Its gradients come with it: the chain is gone through there and back at once."""

    @staticmethod
    def forward(
        ctx: Any, model: SwarmModelForCausalLM, tokens: Any, labels: Any, names: Any, *values: Any
    ) -> Any:
        wanted = any(value.requires_grad for value in values)
        loss, found = model.loss_and_gradients(tokens, labels, wanted)
        ctx.gradients = [found.get(name) for name in names]
        return torch.tensor(loss, requires_grad=wanted)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (outer,) = gradients
        return None, None, None, None, *(None if one is None else one * outer for one in ctx.gradients)


async def _next(writing: Writing, pieces: Any) -> int | None:
    """The next token; None at the end."""
    async for piece in pieces:
        if piece.token is not None:
            return int(piece.token)
    return None
