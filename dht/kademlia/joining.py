"""Joining: gets this peer's DHT node into the swarm's DHT and keeps it there. Part of `hivemind_directory`.

Ways in, all tried at once: the bootstrap addresses, and peers met before (kept on disk, so that an owner who
restarts finds the swarm though nobody gave it an address). While joined, bootstrap peers that are not in
the routing table are still dialled now and then: that heals a swarm that came apart.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hivemind.dht.node import DHTID, DHTNode
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from shoal.dht.addresses import AddressBook, Multiaddress
from shoal.dht.bootstrap import Bootstrap, check_port, libp2p_reason
from shoal.dht.daemon import Daemon
from shoal.dht.kademlia.guarded_p2p import P2P_ERRORS, GuardedP2P
from shoal.protocol.errors import AccessError, BootstrapFailed, ShoalError, StorageError, UsageError
from shoal.protocol.identity import PeerId
from shoal.protocol.private_files import read_private, write_private

logger = logging.getLogger(__name__)

GREET_S = 10.0  # more than p2pd needs to give up on a dial
FIND_S = 10.0
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
_MET_FILE = "peers-met"
_MET_KEPT = 32
_MET_DIALLED = 8
_MET_BYTES = 16 * 1024


class Joiner:
    """`join` once, then `keep` for as long as the directory is open."""

    def __init__(
        self,
        me: PeerId,
        bootstrap: tuple[str, ...],
        deadline_s: float,
        daemon: Daemon,
        node: Callable[[], DHTNode],
        book: AddressBook,
        state_dir: Path,
        rng: random.Random,
    ) -> None:
        self.bootstrap = Bootstrap(me, bootstrap, self._dial_bootstrap, deadline_s)
        self.restarted = asyncio.Event()  # set it when there is a new node
        self._daemon = daemon
        self._node = node
        self._book = book
        self._met_path = state_dir / _MET_FILE
        self._saved: tuple[str, ...] = ()
        self._rng = rng

    async def join(self) -> None:
        """Enter the DHT and learn one's neighbours there.

        Raises BootstrapFailed when no bootstrap address answers; TransportLost, PeerSilent.
        """
        joined = self._joined()
        met: set[asyncio.Task[bool]] = set()
        if not joined:
            await self._load_met()
            met = {asyncio.create_task(self._greet_met(peer)) for peer in self._book.recent(_MET_DIALLED)}
        try:
            await self.bootstrap.once(joined)
            if not self._joined():
                await _first_true(met)
        except BootstrapFailed:
            if not await _first_true(met):
                raise
        finally:
            for greeting in met:
                greeting.cancel()
            if met:
                await asyncio.wait(met)
        node = self._node()
        await self._daemon.call(lambda _: node.find_nearest_nodes([node.node_id]), FIND_S)

    async def keep(self) -> None:
        """Join again after a restart of p2pd, when nobody is left, and when a bootstrap peer is missing."""
        wait_s = FIRST_RETRY_S
        while True:
            await self._wait(wait_s * self._rng.uniform(0.5, 1.5))
            if self.restarted.is_set():
                self.restarted.clear()
                wait_s = FIRST_RETRY_S
            try:
                await self.join()
            except ShoalError as error:
                logger.info("%s", error)
            wait_s = LAST_RETRY_S if self._joined() else min(wait_s * 2, LAST_RETRY_S)
            await self._save_met()

    async def close(self) -> None:
        """Stop dialling, and keep on disk who was met."""
        await self.bootstrap.close()
        await self._save_met()

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.restarted.wait()
        except TimeoutError:
            pass

    def _joined(self) -> frozenset[PeerId]:
        """The peers in the routing table."""
        table = self._node().protocol.routing_table
        return frozenset(PeerId(peer.to_base58()) for peer in table.peer_id_to_uid)

    async def _dial_bootstrap(self, target: Multiaddress) -> None:
        await check_port(target)
        await self._greet(target, (target.route,))

    async def _greet_met(self, peer: PeerId) -> bool:
        routes = self._book.routes(peer)
        try:
            await self._greet(Multiaddress.parse(f"{routes[0]}/p2p/{peer}"), routes)
        except ShoalError as error:  # some are nonsense that it answers
            logger.debug("met before, gone now: %s: %s", peer, error)
            return False
        return True

    async def _greet(self, target: Multiaddress, routes: tuple[str, ...]) -> None:
        """Connect and ping; then both know each other. Raises ShoalError with the reason."""
        peer_id = PeerID.from_base58(target.peer)
        protocol = self._node().protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info)

        async def ping(p2p: GuardedP2P) -> Any:
            await p2p.dial(peer_id, routes)
            return await p2p.call_protobuf_handler(
                peer_id, "DHTProtocol.rpc_ping", request, dht_pb2.PingResponse
            )

        try:
            response = await self._daemon.call(ping, GREET_S)
        except P2P_ERRORS as error:
            if "AccessError" in str(error):
                raise AccessError("it refuses our calls: this peer and that one are not of one run") from None
            raise libp2p_reason(str(error), target) from None
        if response.peer.node_id:  # else it only asks, and has no place in the DHT
            node_id = DHTID.from_bytes(response.peer.node_id)
            await protocol.update_routing_table(node_id, peer_id, responded=True)

    async def _load_met(self) -> None:
        try:
            data = await asyncio.to_thread(read_private, self._met_path, _MET_BYTES)
        except StorageError as error:
            logger.warning("%s", error)
            return
        for line in (data or b"").decode(errors="replace").splitlines()[:_MET_KEPT]:
            try:
                met = Multiaddress.parse(line)
            except UsageError:
                continue
            self._book.learn(met.peer, (met.route,), by_itself=False)

    async def _save_met(self) -> None:
        peers = self._book.recent(_MET_KEPT)
        met = tuple(f"{self._book.routes(peer)[0]}/p2p/{peer}" for peer in peers)
        if met == self._saved:
            return
        try:
            await asyncio.to_thread(write_private, self._met_path, "\n".join(met).encode())
            self._saved = met
        except StorageError as error:
            logger.warning("peers met will not be remembered: %s", error)


async def _first_true(tasks: set[asyncio.Task[bool]]) -> bool:
    """Whether any of `tasks` gives true; returns as soon as one does."""
    while tasks:
        done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if any(task.result() for task in done):
            return True
    return False
