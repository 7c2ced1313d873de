"""The victims of the refusal tests: a pipeline hop and a group member on real sockets, and raw callers.

Everything is the real thing (gRPC with mutual TLS on loopback, real compute, real handlers); only membership
is a list, so that a test decides who is known to whom.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import torch
from outer_world import SIZE, inline, round_spec
from pipeline_world import small_spec
from transport_world import Run

from shoal.dht.directory import SignedRecord
from shoal.protocol.admission import Membership
from shoal.protocol.errors import ShoalError, StreamEnded
from shoal.protocol.framing import last_words
from shoal.protocol.grpc_settings import CHANNEL_OPTIONS, PREFIX, grpc
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import Contact, PeerId, Role
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.training.lane import InlineLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.outer.local import MemoryWeights
from shoal.training.outer.service import GroupMember, Outer
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import StageCompute
from shoal.training.pipeline.downstream import Downstream
from shoal.training.pipeline.driver import Driver
from shoal.training.pipeline.hop import Hop
from shoal.training.pipeline.inference import InferenceHop
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import Link, MicroBatch, Propagate
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replica
from shoal.training.recovery.moments import MomentsDonor
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights

TRAINERS = (Role.TRAINER,)


def pipeline_spec() -> RunSpec:
    """Two stages, bf16 on the wire, few micro-batches undecided."""
    spec = small_spec(2)
    limits = spec.limits.model_copy(update={"undecided_micro_batches": 8})
    return spec.model_copy(update={"limits": limits})


class Known:
    """The membership that a peer's pipeline sees; `after` appears once somebody was suspected."""

    def __init__(self, *peers: PeerId, after: Sequence[PeerId] = ()) -> None:
        self.peers = list(peers)
        self.after = list(after)
        self.suspected: list[tuple[PeerId, str]] = []
        self._change = asyncio.Event()

    def of_stage(self, stage: int) -> list[Replica]:
        return [Replica(peer, 0.001, 0.0) for peer in self.peers]

    def suspect(self, peer: PeerId, reason: str) -> None:
        self.suspected.append((peer, reason))
        self.peers += self.after
        self.after = []
        self._change.set()
        self._change = asyncio.Event()

    def is_gone(self, peer: PeerId) -> bool:
        return False

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return None

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await self._change.wait()


class Peer:
    """A replica: a driver at stage 0, a hop at stage 1, and in both cases inference on the same weights."""

    def __init__(self, run: Run, spec: RunSpec, stage: int, known: Known) -> None:
        self.spec, self.stage, self.known = spec, stage, known
        self.transport = run.transport(*TRAINERS)
        self.me = self.transport.me
        self.format = PayloadFormat.of(spec)
        self.ledger = Ledger()
        self.events: list[tuple[str, dict[str, object]]] = []
        layout = stage_layout(spec, stage_ranges(spec)[stage])
        lane = InlineLane(lambda kind: 0.0)
        initial = genesis(spec, layout)
        self.weights = Weights(spec, layout, initial, lane, "cpu")
        model = StageModel(spec, layout)
        compute = StageCompute(spec, model, self.weights, "cpu", lambda: spec.inner.learning_rate)
        rng = random.Random(stage)

        def event(kind: str, data: dict[str, object]) -> None:
            self.events.append((kind, data))

        behind = range(stage + 1, spec.stages.count)
        if stage == 0:
            self.downstream = Downstream(behind, self.transport, known, self.format, lane, rng, event)
            self.driver = Driver(
                spec,
                me=self.me,
                incarnation=1,
                transport=self.transport,
                replicas=known,
                compute=compute,
                lane=lane,
                ledger=self.ledger,
                downstream=self.downstream,
                stepped=lambda: None,
                event=event,
                rng=rng,
            )
            self.driver.serve()
        else:
            MomentsDonor(stage, self.transport, self.weights, inline).serve()
            self.hop = Hop(
                spec,
                stage,
                me=self.me,
                transport=self.transport,
                replicas=known,
                compute=compute,
                lane=lane,
                ledger=self.ledger,
                downstream=None,
                stepped=lambda: None,
                event=event,
            )
            self.hop.serve()

        async def anchor() -> tuple[int, torch.Tensor]:
            return 0, initial

        InferenceHop(
            spec,
            stage,
            transport=self.transport,
            replicas=known,
            model=model,
            lane=lane,
            anchor=anchor,
            rng=rng,
        ).serve()

    async def start(self, run: Run) -> Peer:
        await self.transport.start()
        run.learn(self.transport)
        return self

    def state(self) -> tuple[object, ...]:
        """All that a micro-batch may change here."""
        weights = self.weights
        users = weights.current.users
        gradient = float(weights.gradient.abs().sum())
        held = self.hop.undecided if self.stage else 0
        return held, len(self.ledger), self.ledger.tokens, weights.inner_steps, users, gradient

    # -- what a driver sends to a hop

    def request(self, driver: PeerId, number: int = 0, **changes: object) -> Propagate:
        """A well-formed request of a driver, but for `changes`."""
        fields: dict[str, object] = {
            "micro_batch": MicroBatch(driver, 1, number),
            "stage": self.stage,
            "attempt": number + 100,
            "chain": (Link(0, driver, 0),),
            "sequences": 2,
            "deadline_s": 30.0,
            **changes,
        }
        return Propagate(**fields)  # type: ignore[arg-type]

    def payload(self, token: int = 1, value: float = 0.5, sequences: int = 2) -> bytes:
        """Tokens and float32 activations that are all the same number, any number."""
        length, width = self.format.length, self.format.width
        tokens = torch.full((sequences, length + 1), token)
        hidden = torch.full((sequences, length, width), value, dtype=torch.float32)
        packed = self.format.pack(tokens, None, self.format.widest)
        return bytes(packed) + hidden.view(torch.uint8).numpy().tobytes()


class GroupPeer:
    """A replica's outer optimisation on real sockets, alone in its group until somebody leads it."""

    def __init__(self, run: Run) -> None:
        self.transport = run.transport(*TRAINERS)
        self.me = self.transport.me
        self.spec = round_spec()
        self.suspected: list[tuple[PeerId, str]] = []
        self.events: list[tuple[str, dict[str, object]]] = []
        start = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
        self.weights = MemoryWeights(start)
        self.outer = Outer(
            self.spec,
            0,
            me=self.me,
            incarnation=1,
            transport=self.transport,
            weights=self.weights,
            genesis=start,
            peers=lambda: [self._member()],
            suspect=lambda peer, reason: self.suspected.append((peer, reason)),
            offload=inline,
            rng=random.Random(1),
            event=lambda kind, data: self.events.append((kind, data)),
        )
        self.outer.serve()

    async def start(self, run: Run) -> GroupPeer:
        await self.transport.start()
        run.learn(self.transport)
        await self.outer.recover()
        return self

    def state(self) -> tuple[object, ...]:
        """All that a round may change here."""
        outer = self.outer
        local = float(self.weights.weights.abs().sum())
        return outer.height, outer.head, outer.state_root, outer.tokens, local

    def refused(self) -> dict[str, int]:
        """How often each peer broke the protocol, as `shoal status` shows it."""
        refused = self.outer.status()["refused"]
        assert isinstance(refused, dict)
        return dict(refused)

    def _member(self) -> GroupMember:
        outer = self.outer
        return GroupMember(
            peer=self.me,
            incarnation=1,
            height=outer.height,
            head=outer.head,
            state_root=outer.state_root,
            steps_since_round=0,
            tokens_since_round=0,
            log_tokens=outer.tokens,
        )


async def say(
    transport: Transport,
    peer: PeerId,
    method: str,
    *messages: tuple[object, bytes],
    reply: Sequence[type] = (),
    max_payload_bytes: int = 1 << 24,
) -> object:
    """Send messages on one stream and END; the header of the reply, None where none is awaited but END.

    Raises what the other side raises.
    """
    async with asyncio.timeout(20), transport.open(peer, method, Channel.BULK) as stream:
        for header, payload in messages:
            await stream.send(header, payload)
        await stream.end()
        try:
            return (await stream.receive(*reply, max_payload_bytes=max_payload_bytes)).header
        except StreamEnded:
            return None


async def raw_call(
    run: Run, server: GrpcTransport, chain_pem: bytes, key_pem: bytes, method: str, *frames: bytes
) -> list[ShoalError | None]:
    """What a modified program is told that shows any certificates and sends any frames.

    The error in the answer to the handshake's hello, and in that to a stream of `method`.
    """
    pin = run.memberships[server.me].verify_leaf_for_dial(contact(run, server))
    credentials = grpc.ssl_channel_credentials(pin.leaf_pem, key_pem, chain_pem)
    options: list[tuple[str, str | int]] = [
        ("grpc.ssl_target_name_override", pin.dns_name),
        *(option for option in CHANNEL_OPTIONS if "message_length" not in option[0]),
    ]
    address = f"dns:///127.0.0.1:{server.port}"
    async with asyncio.timeout(20), grpc.aio.secure_channel(address, credentials, options) as channel:
        hello: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{PREFIX}hello")
        told = [last_words(await hello(b"", timeout=10))]
        stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(PREFIX + method)()
        for frame in frames:
            await stream.write(frame)
        await stream.done_writing()
        answer = await stream.read()
        told.append(last_words(answer) if isinstance(answer, bytes) else None)
        return told


def contact(run: Run, transport: GrpcTransport) -> Contact:
    """How to dial a peer that was started."""
    known = run.contacts.get(transport.me)
    if known is None:
        raise LookupError(transport.me)
    return known


def certified(member: Membership) -> tuple[bytes, bytes]:
    """A member's chain and key, as `raw_call` shows them."""
    return member.chain_pem, member.leaf_key_pem


async def never(stream: Stream) -> None:
    """A handler that must not run."""
    raise AssertionError(f"dispatched for {stream.remote}")
