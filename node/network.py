"""What addresses this machine has to offer. Called once by a peer at its start."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from shoal.protocol import limits

_DOCUMENTATION_ADDRESS = ("192.0.2.1", 9)  # RFC 5737: nobody's; nothing is ever sent there


def outbound_address() -> str:
    """The address this machine uses towards the internet; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_DOCUMENTATION_ADDRESS)
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def announced_addresses(listen: str, port: int, announce: Sequence[str]) -> tuple[str, ...]:
    """ "host:port" texts that others should dial, the best first: the chosen ones, else what is found out."""
    hosts = list(announce) or [outbound_address() if _is_unspecified(listen) else listen]
    return tuple(f"{_bracketed(host)}:{port}" for host in hosts[: limits.ADDRESSES_PER_PEER])


def announced_routes(announce: Sequence[str], dht_port: int) -> tuple[str, ...]:
    """The chosen hosts as multiaddrs for the directory; empty where it should find them itself."""
    return tuple(f"/{_kind(host)}/{host}/tcp/{dht_port}" for host in announce) if dht_port else ()


def on_loopback(multiaddress: str) -> bool:
    """Whether a bootstrap address is on the machine that wrote it, and reaches nobody else."""
    return multiaddress.startswith(("/ip4/127.", "/ip6/::1/", "/dns4/localhost/"))


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _kind(host: str) -> str:
    try:
        return f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        return "dns4"
