"""`/metrics`: the Snapshot in Prometheus's text, made anew for every scrape; --metrics of `up` and `join`.

Names are shoal_<area>_<thing>_<unit>. Gauges tell of the swarm as this peer sees it, counters and histograms
of this peer alone, so that sums over all daemons count everything once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from shoal.node.view.parts import Histogram, Stage
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import ShoalError, UsageError

REQUEST_BYTES = 16 * 1024
REQUEST_S = 5.0
CONNECTIONS = 8  # answered at once
WAITING = 56  # more besides are turned away at once: on an open port anybody may knock


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All metrics of one snapshot."""
    me, run = snapshot.me, snapshot.run
    training = me.training
    yield _gauge("shoal_outer_step", "Rounds of the stage that is least far.", run.height)
    yield _gauge("shoal_tokens_log", "Tokens in the log of the first stage.", run.tokens)
    tokens = me.done.get("tokens", training.get("tokens"))
    yield _counter("shoal_tokens", "Tokens that this peer committed.", {(): _number(tokens)})
    yield _gauge("shoal_throughput_tokens_per_s", "Of the swarm, committed.", snapshot.throughput.now)
    loss = [point.held_out for point in snapshot.loss if point.held_out is not None]
    if loss:
        yield _gauge("shoal_loss_held_out_nats", "Held-out loss a token.", loss[-1])
    yield from _stages(snapshot.stages)
    yield _by(
        "shoal_peers_online_count", "Peers that are here, by state.", "state",
        {state: sum(peer.state == state for peer in snapshot.peers) for state in _states(snapshot)},
    )  # fmt: skip
    about = snapshot.peers_about or len(snapshot.peers)
    yield _gauge(
        "shoal_swarm_peers_count", "About so many are in the swarm; others count those known.", about
    )
    yield _histogram(
        "shoal_reroute_seconds", "Until another replica took over.", {(): snapshot.totals.reroutes}
    )
    phases = {(name,): histogram for name, histogram in snapshot.totals.phases.items()}
    yield _histogram("shoal_allreduce_seconds", "Phases of this peer's rounds.", phases, ["phase"])
    traffic = {("out", kind): float(count) for kind, count in me.bytes_out.items()}
    traffic |= {("in", kind): float(count) for kind, count in me.bytes_in.items()}
    yield _counter("shoal_bytes", "Of frames, by method.", traffic, ["direction", "kind"])
    kinds = {(kind,): float(count) for kind, count in snapshot.totals.events.items()}
    yield _counter("shoal_peer_events", "What happened at this peer.", kinds, ["kind"])
    refusals = {(kind,): float(count) for kind, count in snapshot.trust.refusals.items()}
    yield _counter("shoal_refusals", "Inbound streams that were refused.", refusals, ["reason"])
    if snapshot.checkpoints.age_s is not None:
        yield _gauge("shoal_checkpoint_age_seconds", "Of the last whole one.", snapshot.checkpoints.age_s)
    audits = {(result,): float(count) for result, count in snapshot.trust.audits.items()}
    audits["repaired",] = float(snapshot.trust.repaired_parts)
    yield _counter("shoal_audit", "Checks of others' state and answers, by result.", audits, ["result"])
    yield _gauge("shoal_loop_lag_p99_seconds", "How late the event loop wakes.", me.loop.lag_p99_ms / 1e3)
    yield _gauge("shoal_lane_busy_seconds", "Of the compute lane.", _number(training.get("lane_busy_s")))
    yield _gauge("shoal_uptime_seconds", "Of this process.", me.uptime_s)
    coordinator = snapshot.coordinator
    if coordinator.cpu_share is not None:
        yield _gauge("shoal_process_cpu_share", "Of one core.", coordinator.cpu_share)
    yield _gauge("shoal_telemetry_pushing_count", "Peers that tell this one.", coordinator.pushing)
    if coordinator.history_bytes is not None:
        yield _gauge("shoal_history_size_bytes", "On disk.", coordinator.history_bytes)


@contextlib.asynccontextmanager
async def serve_metrics(host: str, port: int, snapshot: Callable[[], Snapshot]) -> AsyncIterator[int]:
    """Answer GET /metrics while the context lasts; gives the port. UsageError for one that is taken."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(snapshot))
    slots, here = asyncio.Semaphore(CONNECTIONS), 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal here
        here += 1
        try:
            with contextlib.suppress(
                TimeoutError, OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                if here > CONNECTIONS + WAITING:
                    return
                async with slots, asyncio.timeout(REQUEST_S):
                    writer.write(_response(registry, await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        finally:  # asyncio of Python 3.11.2 leaves a connection open whose callback failed
            here -= 1
            writer.close()

    try:
        server = await asyncio.start_server(connected, host, port, limit=REQUEST_BYTES)
    except OSError as error:
        raise UsageError(f"--metrics cannot listen on {host}:{port}: {error.strerror or error}") from error
    async with server:
        yield int(server.sockets[0].getsockname()[1])


class _Snapshots(Collector):
    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from families(self._snapshot())


def _response(registry: CollectorRegistry, request: bytes) -> bytes:
    lines = request.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    if method != "GET" or rest.split(" ")[0].split("?")[0] != "/metrics":
        return _http("404 Not Found", "text/plain", b"GET /metrics\n")
    accept = next((line[7:].strip() for line in lines if line.lower().startswith("accept:")), "")
    encode, content_type = choose_encoder(accept)
    try:
        return _http("200 OK", content_type, encode(registry))
    except ShoalError as error:
        return _http("503 Service Unavailable", "text/plain", f"{error}\n".encode())


def _http(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def _stages(stages: tuple[Stage, ...]) -> Iterator[Metric]:
    by = {str(stage.stage): stage for stage in stages}
    yield _by("shoal_stage_replicas", "Online.", "stage", {name: s.replicas for name, s in by.items()})
    yield _by("shoal_stage_height", "Of its log.", "stage", {name: s.height for name, s in by.items()})
    rates = {name: s.tokens_per_s for name, s in by.items()}
    yield _by("shoal_stage_rate_tokens_per_s", "What its replicas do.", "stage", rates)
    could = [stage.could_tokens_per_s for stage in stages]
    known = [rate for rate in could if rate is not None]
    if known and len(known) == len(could):
        yield _gauge("shoal_stage_rate_min", "Tokens a second that the slowest stage could do.", min(known))


def _states(snapshot: Snapshot) -> list[str]:
    return sorted({peer.state for peer in snapshot.peers})


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counter(name: str, text: str, values: Mapping[Any, float], labels: list[str] | None = None) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels or [])
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _histogram(
    name: str, text: str, values: Mapping[Any, Histogram], labels: list[str] | None = None
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels or [])
    for key, histogram in values.items():
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, histogram.counts), strict=True))
        family.add_metric(list(key), buckets=buckets, sum_value=histogram.sum)
    return family


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
