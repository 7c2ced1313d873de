"""The run's tokenizer file, which peers hand to each other: its BLAKE3 is in the spec, so anybody may answer.

Clients write text with it, drivers read the corpus with it; who only serves needs none. Method `tokenizer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from shoal.node.paths import cache_root
from shoal.node.signed_spec import SignedSpec
from shoal.protocol import limits
from shoal.protocol.errors import NetworkError, NotHere, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.private_files import write_private
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.protocol.wire import Digest, wire_message
from shoal.training.spec import DataSection, RunSpec

METHOD = "tokenizer"
ROLES = frozenset(Role)
_AT_ONCE = 2  # files in memory for those who ask
_FETCH_S = 60.0


@wire_message
@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """Asks for the tokenizer.json of this BLAKE3."""

    digest: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class TokenizerReply:
    """The payload is the file."""


def serve_tokenizer(transport: Transport, known: Callable[[], SignedSpec | None]) -> None:
    """Answer those who lack the file, where it is here; before the transport starts."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def answer(stream: Stream) -> None:
        request: TokenizerRequest = (await stream.receive(TokenizerRequest)).header
        signed = known()
        if signed is None or signed.spec.data.tokenizer_blake3 != request.digest.hex():
            raise NotHere("this is not the run's tokenizer")
        async with turns:
            data = await asyncio.to_thread(_find, signed.spec.data)
            if data is None:
                raise NotHere("the tokenizer is not here either; ask another peer")
            await stream.send(TokenizerReply(), data[1])

    transport.serve(METHOD, answer, ROLES, Channel.BULK)


async def with_tokenizer(spec: RunSpec, transport: Transport, peers: Sequence[PeerId]) -> RunSpec:
    """The spec, naming the file where it lies on this machine; fetched from one of `peers` if it is not here.

    Raises NetworkError when nobody has it, StorageError when it cannot be kept.
    """
    if not spec.data.tokenizer_blake3:
        return spec
    found = await asyncio.to_thread(_find, spec.data)
    path = found[0] if found is not None else await _fetched(spec.data, transport, peers)
    return spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": str(path)})})


def _find(data: DataSection) -> tuple[Path, bytes] | None:
    """The file and its bytes: as the spec names it, or fetched earlier. Another model's file is none."""
    for path in (Path(data.tokenizer).expanduser(), _kept(data.tokenizer_blake3)):
        try:
            with path.open("rb") as file:
                content = file.read(limits.TOKENIZER_BYTES)
        except OSError:
            continue
        if blake3(content).hexdigest() == data.tokenizer_blake3:
            return path, content
    return None


async def _fetched(data: DataSection, transport: Transport, peers: Sequence[PeerId]) -> Path:
    reasons: list[str] = []
    for peer in peers:
        try:
            async with asyncio.timeout(_FETCH_S):
                content = await _ask(transport, peer, data.tokenizer_blake3)
        except (ShoalError, TimeoutError) as error:
            reasons.append(str(error) or f"no answer within {_FETCH_S:g} s")
            continue
        return await asyncio.to_thread(keep_tokenizer, content, data.tokenizer_blake3)
    raise NetworkError(
        f"the tokenizer {data.tokenizer} (BLAKE3 {data.tokenizer_blake3[:12]}) is not on this machine, "
        f"and nobody gave it: {'; '.join(dict.fromkeys(reasons)) or 'no other peer is here'}\n"
        "ask the owner for the file, or be there while the owner's peer is"
    )


async def _ask(transport: Transport, peer: PeerId, digest: str) -> bytes:
    async with transport.open(peer, METHOD, Channel.BULK) as stream:
        await stream.send(TokenizerRequest(bytes.fromhex(digest)))
        await stream.end()
        reply = await stream.receive(TokenizerReply, max_payload_bytes=limits.TOKENIZER_BYTES)
        content = bytes(reply.payload)
    if blake3(content).hexdigest() != digest:
        raise ProtocolViolation(f"{peer} sent another file than the run's tokenizer")
    return content


def keep_tokenizer(content: bytes, digest: str) -> Path:
    """Where later processes of this user find it. Raises StorageError."""
    path = _kept(digest)
    write_private(path, content)
    return path


def _kept(digest: str) -> Path:
    return cache_root() / "tokenizers" / f"{digest}.json"
