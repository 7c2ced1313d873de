"""What only real sockets can show: certificates, impostors, dead and frozen processes, addresses."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import pytest
import uvloop
from transport_world import ANYBODY, Note, Run, echo, other_process, play_run

from shoal.protocol.contacts import ContactBook
from shoal.protocol.dialling import is_address
from shoal.protocol.errors import (
    BindingInvalid,
    ChainInvalid,
    PeerSilent,
    PeerUnreachable,
    ShoalError,
    StreamBroken,
    StreamEnded,
    TokenRevoked,
    TransportLost,
    WrongRun,
)
from shoal.protocol.grpc_settings import PREFIX, grpc
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import Contact, PeerId, PeerKey, Role
from shoal.protocol.limits import CONNECT_S
from shoal.protocol.revocation import RevocationList, sign_revocations
from shoal.protocol.transport import Channel, Stream, call


async def asked(caller: GrpcTransport, peer: PeerId) -> None:
    """One call; raises what goes wrong."""
    reply = await call(caller, peer, "echo", Note(1), Note, timeout_s=30)
    assert reply.header == Note(1)


async def heard_out(stream: Stream) -> None:
    """Take whatever comes until it ends; raises how."""
    while True:
        await stream.receive(Note)


def test_no_certificate_and_a_certificate_of_another_run_are_refused(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        elsewhere = Run(tmp_path, bytes(31) + b"\1")
        server = await run.started()
        stranger = elsewhere.transport()
        elsewhere.contacts.learn(run.contacts.get(server.me) or pytest.fail("no contact"))
        with pytest.raises(WrongRun):  # its own check of our certificates
            await asked(stranger, server.me)
        member, foreign = run.memberships[server.me], elsewhere.member()
        for pair in ((None, None), (foreign.leaf_key_pem, foreign.chain_pem)):
            credentials = grpc.ssl_channel_credentials(member.leaf_pem, *pair)
            options = [
                ("grpc.ssl_target_name_override", member.verify_leaf_for_dial(own(run, server)).dns_name)
            ]
            address = f"127.0.0.1:{server.port}"
            async with grpc.aio.secure_channel(address, credentials, options) as channel:
                method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{PREFIX}hello")
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await method(b"", timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.counters().refusals == {}

    play_run(scene, tmp_path)


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send(Note(1), bytes(1 << 20))


async def receive_big(stream: Stream) -> None:
    await stream.receive(Note, max_payload_bytes=1 << 30)


def own(run: Run, transport: GrpcTransport) -> Contact:
    contact = run.contacts.get(transport.me)
    if contact is None:
        raise LookupError(transport.me)
    return contact


def test_an_impostor_at_the_right_address_is_not_talked_to(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, impostor = await run.started(), await run.started()
        victim = run.member()
        run.learn_contact(victim.me.peer, impostor.port)
        with pytest.raises(PeerUnreachable, match="another certificate"):
            await asked(caller, victim.me.peer)
        await asked(caller, impostor.me)

    play_run(scene, tmp_path)


def test_a_contact_with_somebody_elses_certificates_is_refused(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        victim = PeerKey.generate().peer
        run.contacts.learn(Contact(victim, (f"127.0.0.1:{server.port}",), own(run, server).chain))
        with pytest.raises(BindingInvalid):
            await asked(caller, victim)
        run.contacts.learn(Contact(victim, (f"127.0.0.1:{server.port}",), (b"junk", b"junk")))
        with pytest.raises(ChainInvalid):
            await asked(caller, victim)
        book = ContactBook(run.member())
        book.learn(own(run, server))
        with pytest.raises(BindingInvalid):
            book.learn(Contact(victim, (), own(run, server).chain))
        assert book.get(victim) is None
        assert book.get(server.me) == own(run, server)

    play_run(scene, tmp_path)


def test_a_strangers_bytes_disturb_nobody(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        noises = (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\xff\xff" + bytes(70_000),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        )
        for (_, writer), noise in zip(connections, noises * 7, strict=False):
            writer.write(noise)
        await asked(caller, server.me)
        for _, writer in connections:
            writer.close()

    play_run(scene, tmp_path)


def test_a_revoked_peer_is_refused_in_words_and_its_streams_end(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        member, judge = run.memberships[caller.me], run.memberships[server.me]
        async with caller.open(server.me, "echo") as stream:
            await stream.send(Note(1))
            await stream.receive(Note)
            listed = RevocationList().extended([member.token.token_id], [])
            judge.revocations.adopt(sign_revocations(listed, judge.run_id, run.trust.owner.sign))
            await server.disconnect(caller.me)
            with pytest.raises(StreamBroken):
                await stream.receive(Note)
        with pytest.raises(TokenRevoked):
            await asked(caller, server.me)
        assert server.counters().refusals == {"TokenRevoked": 1}
        await caller.disconnect(server.me)
        with pytest.raises(TokenRevoked):  # told by the handshake this time
            await asked(caller, server.me)
        with pytest.raises(TokenRevoked):
            await asked(server, caller.me)

    play_run(scene, tmp_path)


def test_a_stream_that_is_broken_off_amid_its_first_answer_ends_for_the_caller(tmp_path: Path) -> None:
    """gRPC's abort failed then, since the first answer also says that one begins; the caller waited on."""

    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()

        async def answer(stream: Stream) -> None:
            await stream.receive(Note)
            breaking.append(asyncio.create_task(server.disconnect(caller.me)))  # amid what follows
            await stream.send(Note(2))

        breaking: list[asyncio.Task[None]] = []
        server.serve("answer", answer, ANYBODY)
        async with caller.open(server.me, "answer") as stream:
            await stream.send(Note(1))
            with pytest.raises(StreamBroken):
                await heard_out(stream)
        await asyncio.gather(*breaking)

    play_run(scene, tmp_path)


def test_renewed_leaves_are_used_at_once_on_both_sides_and_open_streams_stay(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        async with caller.open(server.me, "echo") as stream:
            await stream.send(Note(1))
            await stream.receive(Note)
            for renewing in (server, caller):
                run.memberships[renewing.me].renew()
                run.learn(renewing)
                await asked(caller, server.me)
                await asked(server, caller.me)
            await stream.send(Note(2))
            assert (await stream.receive(Note)).header == Note(2)

    play_run(scene, tmp_path)


def test_a_contact_from_before_a_restart_fails_with_a_reason_and_the_new_one_works(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        await asked(caller, server.me)
        member = run.memberships[server.me]
        await server.close()
        member.renew()
        again = run.transport(member=member, port=server.port)
        again.serve("echo", echo, ANYBODY)
        await again.start()
        with pytest.raises(PeerUnreachable, match="out of date"):
            await asked(caller, again.me)
        run.learn(again)
        await asked(caller, again.me)

    play_run(scene, tmp_path)


@pytest.mark.parametrize("method", ["echo", "half", "swallow"])
def test_a_killed_process_breaks_its_streams_at_once(tmp_path: Path, method: str) -> None:
    async def scene(run: Run) -> None:
        caller = await run.started()
        troubles: list[ShoalError] = []
        caller.on_trouble = lambda peer, error: troubles.append(error)
        async with other_process(run) as (peer, process), caller.open(peer, method, Channel.BULK) as stream:
            await stream.send(Note(1))
            if method == "echo":
                await stream.receive(Note)
            begun = asyncio.get_running_loop().time()
            process.kill()
            with pytest.raises(StreamBroken):
                await (send_for_ever(stream) if method == "swallow" else receive_big(stream))
            assert asyncio.get_running_loop().time() - begun < CONNECT_S  # far below any deadline of ours
            await process.wait()
            with pytest.raises(PeerUnreachable, match="refused"):
                await asked(caller, peer)
        assert {type(error) for error in troubles} == {StreamBroken, PeerUnreachable}

    play_run(scene, tmp_path)


def test_a_frozen_process_hangs_neither_sender_nor_receiver_nor_dialler(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, other = await run.started(), await run.started()

        async def send_on() -> None:
            async with caller.open(peer, "swallow", Channel.BULK) as stream:
                await send_for_ever(stream)

        async def receive_on() -> None:
            async with caller.open(peer, "half", Channel.CONTROL) as stream:
                await stream.send(Note(1))
                await receive_big(stream)

        async def freeze() -> None:
            while not caller.counters().bytes_out.get("swallow") or not caller.counters().bytes_in.get(
                "half"
            ):
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(PeerUnreachable, match=r"no answer|Deadline"):
                await asked(other, peer)

        async with other_process(run) as (peer, process):
            outcomes = await asyncio.gather(send_on(), receive_on(), freeze(), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerSilent, PeerSilent, type(None)]

    play_run(scene, tmp_path)


def test_every_address_is_tried_and_each_failure_has_its_reason(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server, impostor = await run.started(), await run.started(), await run.started()
        with socket.socket() as silent, socket.socket() as refusing:
            for one in (silent, refusing):
                one.bind(("127.0.0.1", 0))
            silent.listen(1)
            silent_port, refusing_port = silent.getsockname()[1], refusing.getsockname()[1]
            run.learn_contact(server.me, refusing_port, silent_port, impostor.port, server.port)
            await asked(caller, server.me)
            await caller.disconnect(server.me)
            run.contacts.learn(
                Contact(
                    server.me,
                    (
                        "unix:/tmp/x",
                        f"127.0.0.1:{refusing_port}",
                        f"127.0.0.1:{silent_port}",
                        f"127.0.0.1:{impostor.port}",
                    ),
                    run.memberships[server.me].chain,
                )
            )
            with pytest.raises(PeerUnreachable) as failed:
                await asked(caller, server.me)
        text = str(failed.value)
        for reason in ("unix:/tmp/x: is not host:port", "refused", "no answer within", "another certificate"):
            assert reason in text

    play_run(scene, tmp_path)


def test_addresses_name_hosts_and_ports_only() -> None:
    for good in ("127.0.0.1:80", "[::1]:80", "example.org:8080", "a-b.c:1"):
        assert is_address(good)
    for bad in (
        "unix:/run/x",
        "127.0.0.1",
        "host:port",
        "a b:1",
        "ipv4:1.2.3.4:5",
        "x:1/../",
        "[::1]",
        ":1",
        "h:123456",
    ):
        assert not is_address(bad)


def test_a_port_in_use_is_an_error_with_its_address(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        server = await run.started()
        second = run.transport(port=server.port)
        with pytest.raises(TransportLost, match=str(server.port)):
            await second.start()

    play_run(scene, tmp_path)


def test_control_and_bulk_have_connections_of_their_own_and_share_them_among_streams(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        caller, server = await run.started(), await run.started()
        for _ in range(3):
            await asyncio.gather(
                *(
                    call(caller, server.me, "echo", Note(n), Note, timeout_s=30, channel=channel)
                    for n in range(10)
                    for channel in Channel
                )
            )
        assert open_connections(server.port) == 2

    play_run(scene, tmp_path)


def open_connections(port: int) -> int:
    """Established TCP connections to a port of this machine, as Linux lists them."""
    tables = [path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    assert tables
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sum(row[3] == "01" and int(row[2].rpartition(":")[2], 16) == port for row in rows)


def test_it_runs_on_uvloop(tmp_path: Path) -> None:
    async def scene() -> None:
        run = Run(tmp_path)
        caller, server = await run.started(), await run.started()
        size = 3 << 20
        reply = await call(
            *(caller, server.me, "echo", Note(1), Note),
            timeout_s=30,
            payload=bytes(size),
            max_payload_bytes=size,
        )
        assert len(reply.payload) == size
        await run.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())


def test_what_the_other_side_claims_to_be_is_its_certificates_word(tmp_path: Path) -> None:
    async def scene(run: Run) -> None:
        seen: list[object] = []

        async def handler(stream: Stream) -> None:
            seen.append(stream.remote)

        caller, server = run.transport(Role.OBSERVER), run.transport()
        server.serve("who", handler, ANYBODY)
        for transport in (caller, server):
            await transport.start()
            run.learn(transport)
        with pytest.raises(StreamEnded):
            await call(caller, server.me, "who", Note(1), Note, timeout_s=30)
        assert seen == [run.memberships[caller.me].me]

    play_run(scene, tmp_path)
