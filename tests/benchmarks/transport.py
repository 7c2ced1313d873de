"""Throughput and round trip of the gRPC transport between two processes, mutual TLS and all.

    python tests/benchmarks/transport.py [--seconds 5] [--message-bytes 1048576] [--uvloop]

Prints one line of JSON: bytes per second of one bulk stream (1 MiB messages, one way, acknowledged at the
end), of four at once, and milliseconds of a round trip on an open stream, of a whole call (open, request,
reply, end), and of a round trip while bulk streams run. Two processes share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from shoal.protocol.admission import JoinToken, Membership, OwnerKey
from shoal.protocol.allocator import keep_freed_memory
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import StreamEnded
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import Contact, PeerId, PeerKey, Role
from shoal.protocol.transport import Channel, Stream, Transport, call
from shoal.protocol.wire import Count, wire_message

TRAINERS = frozenset({Role.TRAINER})


@wire_message
@dataclass(frozen=True, slots=True)
class BenchmarkStep:
    """A message of the benchmark."""

    number: Count


async def sink(stream: Stream) -> None:
    """Take everything, then say how many messages came."""
    count = 0
    while True:
        try:
            await stream.receive(BenchmarkStep, max_payload_bytes=1 << 30)
            count += 1
        except StreamEnded:
            await stream.send(BenchmarkStep(count))
            return


async def echo(stream: Stream) -> None:
    """Send everything back."""
    while True:
        try:
            message = await stream.receive(BenchmarkStep, max_payload_bytes=1 << 20)
        except StreamEnded:
            return
        await stream.send(message.header, message.payload)


def transport_of(token: str) -> tuple[GrpcTransport, Membership, ContactBook]:
    """A transport on loopback for a new peer."""
    membership = Membership(JoinToken.parse(token), PeerKey.generate(), time.time)
    contacts = ContactBook()
    return GrpcTransport(membership, contacts, "127.0.0.1"), membership, contacts


async def serve(token: str) -> None:
    """The other process: serve until standard input closes."""
    transport, membership, _ = transport_of(token)
    transport.serve("sink", sink, TRAINERS)
    transport.serve("echo", echo, TRAINERS)
    await transport.start()
    contact = [transport.me, transport.port, [der.hex() for der in membership.chain]]
    print(json.dumps(contact), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()


async def throughput(transport: Transport, peer: PeerId, message_bytes: int, seconds: float) -> float:
    """Bytes per second of one stream, until the other side has acknowledged them."""
    payload = os.urandom(message_bytes)
    begun = time.perf_counter()
    count = 0
    async with transport.open(peer, "sink", Channel.BULK) as stream:
        while time.perf_counter() - begun < seconds:
            await stream.send(BenchmarkStep(count), payload)
            count += 1
        await stream.end()
        received = await stream.receive(BenchmarkStep)
    if received.header.number != count:
        raise RuntimeError(f"{received.header.number} of {count} messages arrived")
    return count * message_bytes / (time.perf_counter() - begun)


async def milliseconds(times: int, action: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Median and 99th percentile of an action."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        await action()
        taken.append(1e3 * (time.perf_counter() - begun))
    return {
        "p50": round(statistics.median(taken), 3),
        "p99": round(statistics.quantiles(taken, n=100)[98], 3),
    }


async def measure(token: str, contact: Contact, options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    transport, _, contacts = transport_of(token)
    contacts.learn(contact)
    peer, size, seconds = contact.peer, options.message_bytes, options.seconds
    await transport.start()
    try:
        await throughput(transport, peer, size, 1.0)  # connections, window probes
        figures: dict[str, object] = {
            "message_bytes": size,
            "loop": "uvloop" if options.uvloop else "asyncio",
            "cores": os.cpu_count(),
        }
        cpu_before = time.process_time()
        figures["bytes_per_s"] = rate = round(await throughput(transport, peer, size, seconds))
        figures["sender_cpu_s_per_gb"] = round((time.process_time() - cpu_before) / (rate * seconds / 1e9), 3)
        four = await asyncio.gather(*(throughput(transport, peer, size, seconds) for _ in range(4)))
        figures["bytes_per_s_of_4_streams"] = round(sum(four))
        async with transport.open(peer, "echo") as stream:

            async def round_trip() -> None:
                await stream.send(BenchmarkStep(1))
                await stream.receive(BenchmarkStep)

            figures["round_trip_ms"] = await milliseconds(2000, round_trip)
            bulk = asyncio.create_task(throughput(transport, peer, size, seconds))
            figures["round_trip_under_bulk_ms"] = await milliseconds(200, round_trip)
            await bulk

        async def whole_call() -> None:
            await call(transport, peer, "echo", BenchmarkStep(1), BenchmarkStep, timeout_s=10)

        figures["call_ms"] = await milliseconds(1000, whole_call)
        return figures
    finally:
        await transport.close()


def main() -> None:
    """Start the other process, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--message-bytes", type=int, default=1 << 20)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    loops = uvloop.new_event_loop if options.uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=loops) as runner:
        if options.serve:
            runner.run(serve(options.serve))
            return
        with tempfile.TemporaryDirectory() as folder:
            owner = OwnerKey.create(Path(folder) / "owner", os.urandom(32), "benchmark", time.time())
            token = owner.issue_token([Role.TRAINER], 3600.0, [], "benchmark", time.time()).encode()
        command = [sys.executable, __file__, "--serve", token, *(["--uvloop"] if options.uvloop else [])]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            if other.stdout is None or other.stdin is None:
                raise RuntimeError("the other process has no pipes")
            peer, port, chain = json.loads(other.stdout.readline())
            contact = Contact(peer, (f"127.0.0.1:{port}",), tuple(bytes.fromhex(der) for der in chain))
            try:
                print(json.dumps(runner.run(measure(token, contact, options))))
            finally:
                other.stdin.close()


if __name__ == "__main__":
    main()
