"""What a caller may ask of the gateway, checked and bounded: bodies of the completions and chat end points.

Fields that would change the answer and are not served are refused by name rather than ignored; unknown ones
are ignored, for clients send many. Used by `app` only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from shoal.node.gateway.errors import Refusal
from shoal.node.inference.client import Turn
from shoal.node.inference.writing import Options

PROMPT_CHARACTERS = 1 << 18
PROMPTS, CHOICES, ANSWERS = 16, 8, 16  # prompts, choices of each, and both together
MESSAGES = 256
SEED_MOST = (1 << 63) - 1
_NEUTRAL: Mapping[str, tuple[object, ...]] = {  # fields that are not served -> values that ask for nothing
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else [] if value is None else value


Text = Annotated[str, StringConstraints(max_length=PROMPT_CHARACTERS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 20)]], Field(min_length=1, max_length=1 << 18)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(_Body):
    """What a stream tells besides the text."""

    include_usage: bool = False


class Sampled(_Body):
    """What both end points share."""

    model: Annotated[str, StringConstraints(max_length=256)]
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1 << 20)] = None  # not OpenAI's; many servers take it
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100.0)] = None  # likewise
    n: Annotated[int | None, Field(ge=1, le=CHOICES)] = None
    seed: Annotated[int | None, Field(ge=-SEED_MOST, le=SEED_MOST)] = None
    stop: Annotated[list[StopText], BeforeValidator(_listed), Field(max_length=4)] = []
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(None, max_length=300)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self, most_tokens: int) -> Options:
        """For each answer, but for the seed. Raises Refusal."""
        return Options(
            max_new_tokens=most_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=tuple(self.stop),
            logit_bias=self._bias(),
        )

    def _bias(self) -> dict[int, float]:
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise Refusal(400, "logit_bias names tokens by number, as text", "logit_bias") from None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=PROMPTS)]
        | Tokens
        | (Annotated[list[Tokens], Field(min_length=1, max_length=PROMPTS)])
    )
    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 20)] = None

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """Each as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def turn(self) -> Turn:
        """As the client knows it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        return Turn(role, content if isinstance(content, str) else "".join(part.text for part in content))


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 20)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1 << 20)] = None


def parse(data: bytes, kind: type[BaseModel]) -> Any:
    """The body as `kind`. Raises Refusal with the field that is wrong."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is not a JSON object")
    for field, neutral in _NEUTRAL.items():
        if field in found and found[field] not in neutral:
            raise Refusal(400, f"{field} is not served here; leave it out", field, "unsupported_parameter")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = (
            ".".join(str(place) for place in first["loc"][:2]).encode("ascii", "backslashreplace").decode()
        )
        raise Refusal(400, f"{field}: {first['msg']}", field) from None
