"""`/metrics`: the Snapshot as Prometheus reads it, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from view_world import NOW, a_spec, own, replica, swarm

from shoal.node.view.assemble import Seen, assemble
from shoal.node.view.metrics import CONNECTIONS, WAITING, families, serve_metrics
from shoal.node.view.parts import EventRow
from shoal.node.view.snapshot import Snapshot
from shoal.node.view.tally import Tally
from shoal.protocol.errors import NetworkError, UsageError

TEN = (  # what matters most
    "shoal_outer_step",
    "shoal_tokens_total",
    "shoal_stage_replicas",
    "shoal_stage_rate_min",
    "shoal_reroute_seconds",
    "shoal_allreduce_seconds",
    "shoal_bytes_total",
    "shoal_peer_events_total",
    "shoal_checkpoint_age_seconds",
    "shoal_audit_total",
)


def a_snapshot() -> Snapshot:
    tally = Tally()
    told: list[tuple[str, dict[str, str | float]]] = [
        ("round", {"stage": 0.0, "height": 3.0, "phases.send.start_s": 0.0, "phases.send.s": 0.7}),
        ("reroute", {"stage": 1.0, "seconds": 0.2}),
        ("reroute", {"stage": 1.0, "seconds": 5.0}),
        ("checkpoint", {"what": "all stages", "heights": "3, 3", "bytes": 1e6}),
    ]
    for number, (kind, fields) in enumerate(told, start=1):
        row = EventRow(number=number, at=NOW - 60.0, kind=kind, peer="me", name="me", text="", fields=fields)
        tally.take(row, mine=True, tokens=0, stages=2)
    me = dataclasses.replace(own(), bytes_out={"propagate": 100}, training={"tokens": 4096})
    view = swarm(replica("me", 0), replica("p1", 1, service_s=0.4), replica("p2", 1, service_s=0.4))
    return assemble(NOW, me, view, a_spec(), Seen(tally=tally))


def scraped(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def serving(snapshot: Callable[[], Snapshot], visit: Callable[[int], Any]) -> Any:
    """What `visit` (with the port, in a thread) gives while metrics are served."""

    async def scene() -> Any:
        async with serve_metrics("127.0.0.1", 0, snapshot) as port:
            return await asyncio.to_thread(visit, port)

    return asyncio.run(scene())


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_prometheus_reads_the_figures_of_the_snapshot() -> None:
    found = scraped(serving(a_snapshot, get))
    assert found["shoal_outer_step", ()] == 3
    assert found["shoal_tokens_total", ()] == 4096
    assert found["shoal_stage_replicas", (("stage", "1"),)] == 2
    assert found["shoal_bytes_total", (("direction", "out"), ("kind", "propagate"))] == 100
    assert found["shoal_checkpoint_age_seconds", ()] == 60
    assert found["shoal_reroute_seconds_count", ()] == 2
    assert found["shoal_reroute_seconds_sum", ()] == pytest.approx(5.2)
    assert found["shoal_reroute_seconds_bucket", (("le", "0.3"),)] == 1
    assert found["shoal_allreduce_seconds_count", (("phase", "send"),)] == 1
    assert found["shoal_peer_events_total", (("kind", "reroute"),)] == 2


def names() -> Iterator[str]:
    for family in families(a_snapshot()):
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_the_ten_that_matter_are_there_and_all_names_have_one_form() -> None:
    found = list(names())
    assert set(TEN) <= set(found)
    assert len(found) == len(set(found))
    assert all(re.fullmatch(r"shoal_[a-z0-9]+(_[a-z0-9]+)+", name) for name in found)


def test_a_peer_that_is_still_starting_says_so_and_other_paths_are_not_found() -> None:
    def starting() -> Snapshot:
        raise NetworkError("this peer is still starting")

    def visit(port: int) -> list[int]:
        codes = []
        for path in ("/metrics", "/", "/../etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(port, path)
            codes.append(refused.value.code)
            refused.value.close()
        return codes

    assert serving(starting, visit) == [503, 404, 404]


def test_an_endless_request_is_cut_and_the_next_one_answered() -> None:
    async def scene() -> None:
        async with serve_metrics("127.0.0.1", 0, a_snapshot) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\n" + b"x" * 100_000)
            assert await reader.read() == b""
            writer.close()
            assert "shoal_outer_step" in await asyncio.to_thread(get, port)

    asyncio.run(scene())


def test_of_many_idle_connections_those_beyond_a_bound_are_hung_up_on_at_once() -> None:
    """Else anybody who reaches the port could take all file descriptors of the daemon."""

    async def scene() -> None:
        async with serve_metrics("127.0.0.1", 0, a_snapshot) as port:
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS + WAITING)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            assert not any(waiting.at_eof() for waiting, _ in idle), "they still have their time"
            for _, other in (*idle, (reader, writer)):
                other.close()

    asyncio.run(scene())


def test_a_port_that_is_taken_is_a_usage_error() -> None:
    async def scene() -> None:
        async with serve_metrics("127.0.0.1", 0, a_snapshot) as port:
            with pytest.raises(UsageError, match="--metrics cannot listen"):
                async with serve_metrics("127.0.0.1", port, a_snapshot):
                    pass

    asyncio.run(scene())


def test_counts_of_a_swarm_known_in_part_are_said_to_be_such() -> None:
    replicas = [replica("me", 0), *(replica(f"p{n}", n % 2) for n in range(9))]
    part = dataclasses.replace(swarm(*replicas), sizes={0: 400.0, 1: 600.0}, sampled=True)
    snapshot = assemble(NOW, own("me"), part, a_spec())
    assert snapshot.peers_about == snapshot.brief()["peers_about"] == 1000
    assert "knows 10 of about 1,000 peers" in snapshot.verdict.text
    about = {metric.name: metric.samples[0].value for metric in families(snapshot) if metric.samples}
    assert about["shoal_swarm_peers_count"] == 1000
    whole = assemble(NOW, own("me"), dataclasses.replace(part, sampled=False), a_spec())
    assert whole.peers_about is None
    assert "about" not in whole.verdict.text
