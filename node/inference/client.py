"""A client that continues a text on the swarm. Called by `shoal generate` and by the demo.

It joins with an inference token, asks the stages for the logits of the next position, draws a token, and
asks again with the longer text: every token recomputes the whole prefix.
"""

from __future__ import annotations

import asyncio
import codecs
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.node.inference.sampling import next_token
from shoal.node.paths import PeerFolder, run_folder
from shoal.node.presence import Listening, Presence, present
from shoal.protocol.admission import JoinToken
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import PeerKey
from shoal.training.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from shoal.training.neighbours import MemberReplicas
from shoal.training.pipeline.inference import infer_logits
from shoal.training.spec import RunSpec

_SWARM_S = 20.0  # to see a replica of every stage


@dataclass(frozen=True, slots=True)
class Request:
    """What to write. Temperature 0 is greedy; the same seed draws the same tokens."""

    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, object]:
        return {"prompt": self.prompt, "text": self.text, "tokens": self.tokens, "seconds": self.seconds}


def generate_text(token: JoinToken, root: Path, request: Request, show: Callable[[str], None]) -> Completion:
    """Join, write, leave; `show` gets the text as it comes. Raises what joining raises, and StageEmpty."""
    with PeerFolder.claim(root) as folder:
        return asyncio.run(_generate(token, folder, request, show))


async def _generate(
    token: JoinToken, folder: PeerFolder, request: Request, show: Callable[[str], None]
) -> Completion:
    key = await asyncio.to_thread(PeerKey.load_or_create, folder.identity_path)
    own_folder = run_folder(folder.path, token.run_id)
    async with present(token, key, own_folder, Listening(), name="client") as presence:
        presence.state = "observing"
        spec = (await presence.learn_spec(own_folder)).spec
        stages = range(spec.stages.count)
        await presence.members.wait_for(lambda view: all(view.online(stage) for stage in stages), _SWARM_S)
        completion = await _continue(presence, spec, request, show)
        await presence.members.leave("done")
    return completion


async def _continue(
    presence: Presence, spec: RunSpec, request: Request, show: Callable[[str], None]
) -> Completion:
    tokenizer = await asyncio.to_thread(load_tokenizer, spec.data)
    ids = [int(i) for i in tokenizer.encode(request.prompt)]
    if not ids:
        raise UsageError("the prompt is empty\ngive the model something to continue with -p TEXT")
    rng = random.Random(request.seed)
    replicas = MemberReplicas(presence.members)
    written: list[int] = []
    pieces = _Pieces(tokenizer)
    started_s = time.monotonic()
    for _ in range(request.max_new_tokens):
        window = torch.tensor([(ids + written)[-spec.model.sequence :]], dtype=torch.int64)
        logits = await infer_logits(presence.transport, replicas, spec, window, presence.rng)
        chosen = next_token(logits[0], request.temperature, rng)
        if chosen == tokenizer.end_of_document:
            break
        written.append(chosen)
        show(pieces.add(chosen))
    show(pieces.rest())
    seconds = time.monotonic() - started_s
    return Completion(request.prompt, tokenizer.decode(written), len(written), round(seconds, 3))


class _Pieces:
    """Decodes token by token; bytes wait until they form a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(bytes((token,)) if token < 256 else b"")
        return self._tokenizer.decode((token,))

    def rest(self) -> str:
        return self._bytes.decode(b"", final=True)
