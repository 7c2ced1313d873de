"""A peer's presence in a swarm: identity, transport, directory and members, started and stopped as one.

The daemon trains on top of it, the inference client asks through it. It knows nothing of models; it
does serve the run's spec and the owner's lists to joiners, since every peer must.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from shoal.dht.beats import Beat
from shoal.dht.directory import PeerRecord
from shoal.dht.hivemind_directory import DirectorySettings, HivemindDirectory
from shoal.dht.members import Members
from shoal.dht.records import RecordBook
from shoal.node.network import announced_addresses, announced_routes
from shoal.node.reachability import serve_dial_back
from shoal.node.signed_spec import SignedSpec, serve_spec, spec_of_any
from shoal.node.version import VERSION
from shoal.node.view.names import readable
from shoal.protocol import limits
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import BootstrapFailed, NetworkError, ShoalError
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import PeerId, PeerKey
from shoal.protocol.revocation import RevocationBook
from shoal.protocol.write_behind import WriteBehind

_SPEC_S = 30.0  # for somebody who knows the spec to be found ...
_ASKED = 12  # ... of these at a time, which takes less even if none answers
_RENEWAL_CHECK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """Where a peer listens and what it tells others. Port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 0
    dht_port: int = 0
    announce: tuple[str, ...] = ()  # hosts under which others reach this machine


@dataclass
class Presence:
    """One live peer below training. Made by `present`."""

    token: JoinToken
    key: PeerKey
    membership: Membership
    contacts: ContactBook
    transport: GrpcTransport
    directory: HivemindDirectory
    listening: Listening
    name: str
    rng: random.Random
    make_beat: Callable[[], Beat] = Beat
    state: str = "joining"
    stages: tuple[int, ...] = ()
    states: tuple[str, ...] = ()  # at each of them, where they differ
    device: str = ""
    spec: SignedSpec | None = None
    incarnation: int = field(default_factory=time.time_ns)
    members: Members = field(init=False)

    def __post_init__(self) -> None:
        self.members = Members(
            transport=self.transport,
            directory=self.directory,
            membership=self.membership,
            contacts=self.contacts,
            record_book=RecordBook(self.membership),
            make_record=self._record,
            make_beat=lambda: self.make_beat(),
            clock=time.time,
            rng=random.Random(self.rng.getrandbits(64)),
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """ "host:port" of the transport, as others are told."""
        return announced_addresses(self.listening.host, self.transport.port, self.listening.announce)

    def others(self) -> list[PeerId]:
        """Whoever else is here, in random order."""
        here = [member.peer for member in self.members.view().here() if member.peer != self.transport.me]
        self.rng.shuffle(here)
        return here

    def announce(self, state: str, stages: tuple[int, ...], states: tuple[str, ...] = ()) -> None:
        """Tell everybody what this peer does from now on, and at each of its stages if that differs."""
        self.state, self.stages, self.states = state, stages, states
        self.members.changed_now()

    async def learn_spec(self, folder: Path) -> SignedSpec:
        """The run's spec, from disk or from whoever answers first; kept on disk.

        Raises NetworkError when nobody is there or nobody gives it, AccessError when this peer is refused.
        """
        kept = await asyncio.to_thread(SignedSpec.load, folder)
        if kept is not None:
            self.spec = kept
            return kept
        reasons: dict[PeerId, ShoalError] = {}
        try:
            async with asyncio.timeout(_SPEC_S):
                while (found := await self._ask_for_spec(reasons)) is None:
                    await self.members.changed()
        except TimeoutError:
            names = {member.peer: member.name for member in self.members.view().members}
            told = "\n".join(f"{names.get(peer) or peer}: {reason}" for peer, reason in reasons.items())
            raise NetworkError(
                f"nobody gave the run's spec within {_SPEC_S:g} s\n{told or 'no peer of the run was found'}\n"
                "join again in a while; shoal status at the owner's peer shows who is here"
            ) from None
        await asyncio.to_thread(found.save, folder)
        self.spec = found
        return found

    async def _ask_for_spec(self, reasons: dict[PeerId, ShoalError]) -> SignedSpec | None:
        """Ask those who are here; `reasons` takes why somebody did not tell.

        Raises AccessError when this peer is refused and nobody gives it.
        """
        found, failures = await spec_of_any(self.transport, self.others()[:_ASKED], self.membership)
        reasons |= failures
        return found

    async def keep_leaf_fresh(self) -> None:
        """Renew the leaf certificate at two thirds of its life, until cancelled. Raises TokenExpired."""
        while True:
            await asyncio.sleep(_RENEWAL_CHECK_S)
            if self.membership.renew_due():
                self.membership.renew()

    def _record(self) -> PeerRecord:
        return PeerRecord(
            peer=self.transport.me,
            incarnation=self.incarnation,
            sequence=0,  # filled in by Members, as is the time
            issued_unix_s=0.0,
            ttl_s=limits.RECORD_TTL_S,
            state=self.state,
            stages=self.stages,
            states=self.states,
            name=self.name,
            addresses=self.addresses,
            chain=self.membership.chain,
            device=self.device,
            tokens_per_s=0.0,
            version=VERSION,
        )


@contextlib.asynccontextmanager
async def present(
    token: JoinToken,
    key: PeerKey,
    folder: Path,
    listening: Listening,
    *,
    name: str = "",
    revocations_path: Path | None = None,
    amendments_path: Path | None = None,
    more_bootstrap: tuple[str, ...] = (),
    alone_is_fine: bool = False,
    upload_bytes_per_s: float | None = None,
) -> AsyncIterator[Presence]:
    """Join the swarm of `token`; leave it when the context ends.

    `revocations_path`, `amendments_path`: where the lists are kept, if not in `folder`. `alone_is_fine`:
    nobody answering is no error (the owner starts first). `upload_bytes_per_s`: most that it may send, None:
    no limit. Raises
    AccessError, BootstrapFailed, TransportLost, and UsageError for a limit that is too low.
    """
    lists = WriteBehind()
    book = RevocationBook(token.run_id, token.root_der, revocations_path or folder / "revocations", lists)
    orders = AmendmentBook(token.run_id, token.root_der, amendments_path or folder / "amendments", lists)
    membership = Membership(token, key, time.time, book, orders)
    contacts = ContactBook()
    transport = GrpcTransport(membership, contacts, listening.host, listening.port, upload_bytes_per_s)
    settings = DirectorySettings(
        state_dir=folder / "dht",
        host=listening.host,
        port=listening.dht_port,
        announce=announced_routes(listening.announce, listening.dht_port),
        bootstrap=tuple(dict.fromkeys((*token.bootstrap, *more_bootstrap))),
    )
    rng = random.SystemRandom()
    directory = HivemindDirectory(key, membership, settings, rng=rng)
    presence = Presence(
        token, key, membership, contacts, transport, directory, listening, name or default_name(key), rng
    )
    serve_spec(transport, lambda: presence.spec, membership)
    serve_dial_back(transport)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(lists.close)
        await transport.start()
        stack.push_async_callback(transport.close)
        stack.push_async_callback(directory.close)
        try:
            await directory.start()
        except BootstrapFailed:
            if not alone_is_fine:
                raise
        await stack.enter_async_context(presence.members)
        yield presence


def default_name(key: PeerKey) -> str:
    """A readable name for a peer nobody named."""
    return readable(key.peer)
