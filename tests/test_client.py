"""Text from servers: whole characters, stops, refusals; and on real sockets while servers die."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from serving_world import World, greedy, serving_spec, weights_of
from transport_world import Run, play_run

from shoal.dht.directory import SignedRecord
from shoal.node import AsyncClient, Client, Options
from shoal.node.inference.client import Turn, transcript
from shoal.node.inference.pieces import Decoder, StopFilter
from shoal.node.inference.writing import Piece, Text
from shoal.protocol.errors import TokenInvalid, UsageError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.virtual_time import run
from shoal.training.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from shoal.training.lane import ThreadLane
from shoal.training.model.layout import stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.server import SessionServer
from shoal.training.serving.versions import Versions

BYTES = ByteTokenizer()


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    decoder = Decoder(tokenizer)
    return "".join([*(decoder.add(token) for token in ids), decoder.rest()])


@given(st.text(max_size=30))
def test_pieces_of_bytes_join_to_the_text(text: str) -> None:
    assert decoded(BYTES, BYTES.encode(text).tolist()) == text.encode(errors="replace").decode()


def test_pieces_of_a_tokenizer_json_join_to_the_text(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["so much depends upon a red wheel barrow"] * 5, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    text = "so much depends upon né 火 \U0001f41f wheel"
    assert decoded(tokenizer, tokenizer.encode(text).tolist()) == text
    decoder = Decoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer.encode("é\U0001f41f").tolist()]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_text_ends_before_the_first_stop_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    whole, found, filtered = "".join(pieces), "", StopFilter(stops)
    for piece in pieces:
        found += filtered.add(piece)
        if filtered.stopped:
            break
    found += "" if filtered.stopped else filtered.rest()
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (found, filtered.stopped) == (whole, False)
    else:
        assert filtered.stopped
        assert whole.startswith(found)
        assert any(whole[len(found) :].startswith(stop) for stop in stops)
        assert not any(stop in found for stop in stops)


def text_of(world: World) -> Text:
    return Text(world.spec, BYTES, world.client, world, random.Random(1))


def test_a_text_in_pieces_and_where_it_stops() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            expected = bytes(t for t in greedy(world.spec, world.weights, list(b"def "), 40) if t < 256)
            async with text_of(world).writing("def ", Options(max_new_tokens=40)) as writing:
                pieces = [piece async for piece in writing]
            assert writing.text == expected.decode(errors="replace") == "".join(p.text for p in pieces)
            assert all(isinstance(piece, Piece) for piece in pieces)
            assert (writing.finish, writing.prompt_tokens, writing.new_tokens) == ("length", 4, 40)
            whole, stop = writing.text, writing.text[10:12]
            async with text_of(world).writing("def ", Options(max_new_tokens=40, stop=(stop,))) as writing:
                text = "".join([piece.text async for piece in writing])
            assert (text, writing.finish) == (whole[: whole.index(stop)], "stop")
            await asyncio.sleep(1)
            assert not any(peer.server.sessions for peer in world.peers)

    run(main, limit_s=60)


def test_what_the_model_cannot_do_is_refused_before_anybody_is_asked() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world:
            text = text_of(world)
            wrong = (
                ("x" * 128, Options(), "a prompt of 128 tokens"),
                ("x", Options(max_new_tokens=-1), "-1 new ones"),
                ("x", Options(temperature=-1.0), "out of bounds"),
                ("x", Options(top_p=float("nan")), "out of bounds"),
                ("x", Options(seed=-1), "out of bounds"),
                ("x", Options(logit_bias={-5: 1.0}), "out of bounds"),
                ("x", Options(stop=("y",) * 17), "at most 16 stops"),
                ([1, 300], Options(), "outside the vocabulary"),
            )
            for prompt, options, words in wrong:
                with pytest.raises(UsageError, match=words):
                    async with text.writing(prompt, options):
                        pass
            assert not any(peer.transport.counters().bytes_in for peer in world.peers)

    run(main, limit_s=60)


def test_a_long_prompt_is_encoded_beside_the_loop() -> None:
    class Slow(Tokenizer):
        """Notes where it encodes; a token covers 1024 characters."""

        vocabulary, end_of_document, fingerprint = 257, 256, ""
        threads: ClassVar[list[int]] = []

        def encode(self, text: str | bytes) -> np.ndarray:
            self.threads.append(threading.get_ident())
            return np.zeros(max(len(text) // 1024, 1), np.int32)

        def decode(self, ids: Iterable[int]) -> str:
            return ""

    async def main() -> None:
        network = MemoryNetwork()
        client = network.transport(PeerId("client"))
        text = Text(serving_spec(1), Slow(), client, Peers([[]]), random.Random(1))
        async with text.writing("x" * 1024 * 100, Options()) as writing:
            assert writing.prompt_tokens == 100
        with pytest.raises(UsageError, match="a prompt of 200 tokens"):
            async with text.writing("x" * 1024 * 200, Options()):
                pass
        assert threading.get_ident() not in Slow.threads
        async with text.writing("x", Options()) as writing:
            assert (writing.prompt_tokens, Slow.threads[-1]) == (1, threading.get_ident())

    asyncio.run(main())


def test_a_chat_is_a_transcript_that_stops_at_the_next_turn() -> None:
    prompt, options = transcript([Turn("system", "Be kind."), Turn("user", "Hello")], Options(stop=("!",)))
    assert prompt == "System: Be kind.\nUser: Hello\nAssistant:"
    assert options.stop == ("!", "\nUser:", "\nSystem:")
    with pytest.raises(UsageError, match="'wizard'"):
        transcript([Turn("wizard", "Hello")], Options())


def test_a_client_needs_a_token_and_has_to_join() -> None:
    with pytest.raises(TokenInvalid):
        AsyncClient("rubbish")
    with pytest.raises(TokenInvalid):
        Client("rubbish")


class Peers:
    """Servers as a client on real sockets knows them."""

    def __init__(self, servers: list[list[PeerId]]) -> None:
        self.servers = servers

    def of_stage(self, stage: int) -> list[Replica]:
        return [Replica(peer, 0.001) for peer in self.servers[stage]]

    def suspect(self, peer: PeerId, reason: str) -> None:
        pass

    def is_gone(self, peer: PeerId) -> bool:
        return False

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return None

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("struck", [0, 1])
def test_on_real_sockets_a_server_that_dies_changes_nothing(tmp_path: Path, struck: int) -> None:
    async def scene(net: Run) -> None:
        spec, tasks = serving_spec(2), []
        weights = weights_of(spec)
        peers, transports = Peers([[], []]), {}
        for stage in (0, 0, 1, 1):
            transport, versions, lane = net.transport(Role.TRAINER), Versions(), ThreadLane()
            versions.publish(bytes(32), weights[stage])
            layout = stage_layout(spec, stage_ranges(spec)[stage])
            server = SessionServer(
                spec, stage, layout, transport=transport, lane=lane, versions=versions, budget_bytes=512 << 20
            )
            server.serve()
            await transport.start()
            net.learn(transport)
            tasks.append((asyncio.create_task(server.run()), lane))
            peers.servers[stage].append(transport.me)
            transports[transport.me] = transport
        client = net.transport(Role.INFERENCE)
        text = Text(spec, BYTES, client, peers, random.Random(1))
        try:
            async with text.writing([1, 2, 3], Options(max_new_tokens=40)) as writing:
                tokens = []
                async for piece in writing:
                    if piece.token is not None:
                        tokens.append(piece.token)
                    if len(tokens) == 12 and writing.figures.replaced == 0:
                        server_id = writing.route()[struck]
                        if server_id in transports:
                            await transports.pop(server_id).close()
            assert tokens == greedy(spec, weights, [1, 2, 3], 40)
            assert writing.figures.replaced == 1
            print(f"longest gap {writing.figures.longest_gap_s:.3f} s")
        finally:
            for task, lane in tasks:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await lane.close()

    play_run(scene, tmp_path)
