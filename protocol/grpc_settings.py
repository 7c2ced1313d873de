"""How gRPC is set up: options of channels and servers, credentials. Used by the gRPC transport only.

Importing this module imports grpc, with its fork support off: a process that starts children (p2pd) would
get notices and stalls from fork handlers it does not need.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # refused handshakes are counted and told as errors

import grpc as grpc  # the variable is read at this moment
import grpc.aio

from shoal.protocol.admission import Membership, Pin
from shoal.protocol.framing import MAX_FRAME_BYTES
from shoal.protocol.limits import (
    CONNECT_S,
    KEEPALIVE_ANSWER_S,
    KEEPALIVE_S,
    MIB,
    STREAMS_PER_PEER,
)

PREFIX = "/shoal/"
_STREAM_WINDOW_BYTES = 1 * MIB  # 50 ms of 160 Mbit/s at once; gRPC's bandwidth probes raise it where needed
_SHARED: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.http2.lookahead_bytes", _STREAM_WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 1),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_ANSWER_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED,
    ("grpc.use_local_subchannel_pool", 1),  # control and bulk must not share a connection
    ("grpc.enable_retries", 0),  # retries are decided above, where it is known what may be repeated
    ("grpc.enable_http_proxy", 0),  # peers are dialled, not proxied
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED,
    ("grpc.so_reuseport", 0),  # two daemons on one port is a mistake, not load balancing
    ("grpc.max_concurrent_streams", 2 * STREAMS_PER_PEER),  # a connection; the exact caps are in `service`
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.server_handshake_timeout_ms", int(CONNECT_S * 1000)),
)


def channel_credentials(membership: Membership, pin: Pin) -> grpc.ChannelCredentials:
    """Mutual TLS with exactly the pinned leaf as trust anchor."""
    return grpc.ssl_channel_credentials(pin.leaf_pem, membership.leaf_key_pem, membership.chain_pem)


def server_credentials(
    membership: Membership, renewed: Callable[[], grpc.ServerCertificateConfiguration | None]
) -> grpc.ServerCredentials:
    """Mutual TLS; `renewed` is asked at every handshake, on a thread of gRPC's."""
    return grpc.dynamic_ssl_server_credentials(
        server_configuration(membership),
        renewed,  # type: ignore[arg-type]  # None, for no change, is what grpc documents
        require_client_authentication=True,
    )


def server_configuration(membership: Membership) -> grpc.ServerCertificateConfiguration:
    """This member's present leaf, and the run's root for judging callers."""
    pair = (membership.leaf_key_pem, membership.chain_pem)
    return grpc.ssl_server_certificate_configuration([pair], membership.root_pem)
