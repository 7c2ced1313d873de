"""Multiaddrs: their syntax, and the book of those learnt from DHT calls.

`bootstrap` parses what a token carries; `guarded_p2p` fills the book and dials from it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import OrderedDict
from dataclasses import dataclass

from shoal.protocol import limits
from shoal.protocol.errors import RecordInvalid, UsageError
from shoal.protocol.identity import PeerId, public_key_of

_ROUTE = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]{1,120})/(tcp|udp)/(\d{1,5})((?:/[a-z0-9.-]+)*)\Z")
_PEERS_KNOWN = 4096
_LOOPBACK = 2


@dataclass(frozen=True, slots=True)
class Multiaddress:
    """A multiaddr that ends in /p2p/ID."""

    text: str
    route: str  # without /p2p/ID: what is dialled
    peer: PeerId
    host: str
    port: int
    is_tcp: bool

    @classmethod
    def parse(cls, text: str) -> Multiaddress:
        """Raises UsageError that says what is wrong with `text`."""
        route, marker, peer = text.strip().rpartition("/p2p/")
        if not marker:
            raise UsageError("it does not end in /p2p/ and a peer id")
        try:
            public_key_of(PeerId(peer))
        except RecordInvalid as error:
            raise UsageError(str(error)) from None
        host, port, protocol = _split_route(route)
        return cls(f"{route}/p2p/{peer}", route, PeerId(peer), host, port, protocol == "tcp")


def is_route(text: str) -> bool:
    """Whether `text` is a multiaddr of a host and a port that can be dialled."""
    try:
        _split_route(text)
    except UsageError:
        return False
    return True


def best_first(routes: tuple[str, ...]) -> tuple[str, ...]:
    """The routes worth telling others, at most ADDRESSES_PER_PEER: public ones first, loopback if alone."""
    ranked = sorted((rank, route) for route in routes if (rank := _rank(route)) is not None)
    best = [route for rank, route in ranked if rank < _LOOPBACK] or [route for _, route in ranked]
    return tuple(best[: limits.ADDRESSES_PER_PEER])


def _rank(route: str) -> int | None:
    """0 for names and public addresses, 1 for private ones, _LOOPBACK; None for what cannot be dialled."""
    try:
        host = _split_route(route)[0]
    except UsageError:
        return None
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return _LOOPBACK if host == "localhost" else 0
    if number.is_loopback:
        return _LOOPBACK
    if number.is_link_local or number.is_unspecified:
        return None
    return 0 if number.is_global else 1


def host_route(host: str, port: int) -> str:
    """The multiaddr to listen on. Raises UsageError unless `host` is an IP address."""
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(f"cannot listen on {host!r}: give an IP address, such as 0.0.0.0") from None
    return f"/ip{number.version}/{number}/tcp/{port}"


def is_taken(host: str, port: int) -> bool:
    """Whether nobody can listen there any more. `host`: an IP address of this machine; port 0 never is."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _split_route(route: str) -> tuple[str, int, str]:
    matched = _ROUTE.match(route)
    if matched is None:
        raise UsageError("it is not of the form /ip4/ADDRESS/tcp/PORT or /dns4/NAME/tcp/PORT")
    kind, host, protocol, port, _ = matched.groups()
    try:
        if kind.startswith("ip") and ipaddress.ip_address(host).version != int(kind[2]):
            raise UsageError(f"{host} is not an {kind} address")
    except ValueError:
        raise UsageError(f"{host!r} is not an IP address") from None
    if not 0 < int(port) < 65536:
        raise UsageError(f"there is no port {port}")
    return host, int(port), protocol


class AddressBook:
    """Where peers can be dialled: what they said themselves, else what others said. Bounded."""

    def __init__(self) -> None:
        self._known: OrderedDict[PeerId, tuple[tuple[str, ...], bool]] = OrderedDict()

    def learn(self, peer: PeerId, routes: tuple[str, ...], *, by_itself: bool) -> None:
        """Keep `routes` of a peer; hearsay never replaces what the peer said itself."""
        good = tuple(route for route in routes if is_route(route))[: limits.ADDRESSES_PER_PEER]
        _, certain = self._known.get(peer, ((), False))
        if not good or (certain and not by_itself):
            return
        self._known[peer] = good, by_itself
        self._known.move_to_end(peer)
        if len(self._known) > _PEERS_KNOWN:
            self._known.popitem(last=False)

    def routes(self, peer: PeerId) -> tuple[str, ...]:
        return self._known.get(peer, ((), False))[0]

    def recent(self, most: int) -> tuple[PeerId, ...]:
        """Peers learnt of last, the last one first, but those that spoke for themselves before the others."""
        return tuple(sorted(reversed(self._known), key=lambda peer: not self._known[peer][1])[:most])
