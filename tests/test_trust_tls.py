"""The certificates in gRPC's TLS: the pinned peer is accepted, impostors and strangers are refused."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # read when grpc is imported
import grpc
from trust_world import World

from shoal.protocol.admission import Membership
from shoal.protocol.certificates import chain_of_pem, leaf_dns_name


async def _shown(request: bytes, context: Any) -> bytes:
    """Answers with the certificates that the server saw."""
    shown = context.auth_context()
    return b"".join((*shown["x509_pem_cert"], *shown["x509_pem_cert_chain"]))


class Served:
    """A server that shows this member's certificates and demands the caller's."""

    def __init__(self, member: Membership) -> None:
        self._member = member

    async def __aenter__(self) -> int:
        """The port."""
        self._server = grpc.aio.server()
        shown: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_shown)
        handler = grpc.method_handlers_generic_handler("shoal", {"shown": shown})
        self._server.add_generic_rpc_handlers([handler])
        pair = (self._member.leaf_key_pem, self._member.chain_pem)
        credentials = grpc.ssl_server_credentials([pair], self._member.root_pem, require_client_auth=True)
        port: int = self._server.add_secure_port("127.0.0.1:0", credentials)
        await self._server.start()
        return port

    async def __aexit__(self, *exception: object) -> None:
        await self._server.stop(None)


async def dial(port: int, expected: Membership, caller: Membership | None) -> tuple[bytes, ...]:
    """The chain the server saw, `expected`'s leaf being the only trust anchor."""
    pair = (caller.leaf_key_pem, caller.chain_pem) if caller else (None, None)
    credentials = grpc.ssl_channel_credentials(expected.leaf_pem, *pair)
    options = [
        ("grpc.ssl_target_name_override", leaf_dns_name(expected.key.peer)),
        ("grpc.enable_retries", 0),
    ]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        shown: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/shoal/shown")
        return chain_of_pem(await shown(b"", timeout=10))


async def refused(port: int, expected: Membership, caller: Membership | None) -> bool:
    try:
        await dial(port, expected, caller)
    except grpc.aio.AioRpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False


def test_the_pinned_peer_is_accepted_and_nobody_else(tmp_path: Path) -> None:
    now = time.time()
    world, elsewhere = World(tmp_path / "owner", now=now), World(tmp_path / "elsewhere", now=now)
    server, caller, impostor, stranger = world.member(), world.member(), world.member(), elsewhere.member()

    async def scene() -> None:
        async with Served(server) as port, Served(impostor) as posing_port:
            assert server.verify(await dial(port, server, caller)) == caller.me
            assert await refused(posing_port, server, caller), "another member's leaf"
            assert await refused(port, server, None), "no certificate"
            assert await refused(port, server, stranger), "a chain under another root"

    asyncio.run(scene())


def test_a_leaf_under_an_extended_token_is_accepted_in_tls(tmp_path: Path) -> None:
    world = World(tmp_path / "owner", now=time.time())
    server, caller = world.member(), world.member()
    caller.adopt_token_certificate(world.owner.extend_token(caller.token.token_id, 1e7, world.now))

    async def scene() -> None:
        async with Served(server) as port:
            assert server.verify(await dial(port, server, caller)) == caller.me

    asyncio.run(scene())
