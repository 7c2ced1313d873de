"""The page under test: its real process over a control socket that a test answers; snapshots with figures."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from view_peers import inline
from view_world import NOW, own

from shoal.node.control import Action, serve_control
from shoal.node.dashboard.address import DashboardOptions
from shoal.node.dashboard.child import Dashboard, dashboard
from shoal.node.view import parts
from shoal.node.view.archive import Archive, Entry
from shoal.node.view.history import History
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import StorageError

PHASES = (
    ("prepare", 0.05),
    ("wait", 0.2),
    ("send", 0.5),
    ("reduce", 0.2),
    ("collect", 0.4),
    ("decide", 0.1),
    ("apply", 0.15),
)


def peer_row(number: int, stage: int | None, rng: random.Random, **changes: Any) -> parts.Peer:
    """A peer with every figure told."""
    row = parts.Peer(
        peer=f"12D3Koo{number:04d}",
        name=f"peer-{number}",
        state="online" if stage is not None else "observing",
        liveness="alive",
        reason="",
        stages=() if stage is None else (stage,),
        tokens_per_s=rng.uniform(200, 1500) if stage is not None else 0.0,
        backlog_s=0.12,
        rtt_ms=rng.uniform(0.5, 90),
        height=41,
        head="ab" * 32,
        state_root="cd" * 32,
        roles=("trainer",),
        token_id=f"{number:08x}",
        device="cpu (8 threads)",
        version="0.1.0",
        heard_s=0.4,
        service_s=0.08,
        uplink_bytes_per_s=2.5e6,
        told_s=1.0,
        uptime_s=3_600.0 * number,
        memory_bytes=12 << 30,
        reachable="from outside",
        tokens=1_234_567 * number,
        micro_batches=400 * number,
        rejected=number,
        redone=2,
        inner_steps=600,
        loss=2.1,
        busy_share=rng.uniform(0.4, 0.99),
        up_bytes_per_s=rng.uniform(1e4, 3e6),
        down_bytes_per_s=rng.uniform(1e4, 3e6),
        bytes_out=5 << 30,
        bytes_in=4 << 30,
        guards=(1,),
        sessions=0,
        if_leaves="If it leaves, its stage goes on with 2 others.",
    )
    return replace(row, **changes)


def full_snapshot(stages: int = 4, replicas: int = 3, at: float = NOW, seed: int = 6) -> Snapshot:
    """A run in the middle of its life: one lone replica, one slow link, a few faults."""
    rng = random.Random(seed)
    numbers = iter(range(1, 10_000))
    rows = [peer_row(next(numbers), stage, rng) for stage in range(stages) for _ in range(replicas)]
    rows = [row for row in rows if row.stages != (stages - 2,) or row is rows[(stages - 2) * replicas]]
    rows[0] = replace(rows[0], peer="me", name="owner", roles=("owner", "trainer"))
    if len(rows) > 4:
        rows[2] = replace(rows[2], liveness="suspect", reason="no heartbeat for 2.3 s", findings=("hung",))
        rows[4] = replace(rows[4], state="joining", tokens_per_s=0.0, told_s=None, busy_share=None)
    rows += [peer_row(next(numbers), None, rng, name="ann's laptop", roles=("observer",))]
    columns = tuple(
        parts.Stage(
            stage=stage,
            layers=(4 * stage, 4 * stage + 3),
            replicas=sum(row.stages == (stage,) and row.liveness == "alive" for row in rows),
            guardians=2,
            height=41,
            heads_equal=True,
            tokens_per_s=sum(row.tokens_per_s for row in rows if row.stages == (stage,)),
            could_tokens_per_s=3000.0,
            balance=0.45 if stage == stages - 2 else 0.93,
            weakest=stage == stages - 2,
        )
        for stage in range(stages)
    )
    loss = tuple(
        parts.LossPoint(
            tokens=20_000 * i,
            at=at - 10 * (200 - i) - (i % 7),
            train=1.6 + 3.2 * math.exp(-i / 40) + rng.gauss(0, 0.05),
            held_out=1.7 + 3.2 * math.exp(-i / 40) if i % 10 == 0 else None,
        )
        for i in range(1, 201)
    )
    rounds_done = (
        parts.Marker(at=at - 1000 + i, tokens=100_000 * i, kind="round", text=f"round {i}")
        for i in range(1, 40)
    )
    markers = (
        *rounds_done,
        parts.Marker(at=at - 900, tokens=1_650_000, kind="peer_gone", text="peer-3 is gone: silent for 5 s"),
        parts.Marker(at=at - 300, tokens=3_100_000, kind="reroute", text="stage 1 rerouted"),
    )
    told = [row for row in rows if row.told_s is not None][:8]
    rounds = tuple(
        parts.Round(
            stage=n % stages,
            height=38 + n // 2,
            at=at - 60 + 8 * n,
            seconds=2.4,
            tokens=120_000,
            contributors=3,
            skipped=n % 2,
            bytes_out=3_400_000,
            codecs=("int4", "int8"),
            leader=told[0].peer,
            members=tuple(_member(row, rng) for row in told[:3]),
            slowest={"send": told[1].peer, "collect": told[2].peer},
        )
        for n in range(5)
    )
    links = tuple(
        parts.Link(
            source=a.peer,
            target=b.peer,
            rtt_ms=rng.uniform(0.4, 180),
            bytes_per_s=rng.uniform(1e5, 1e7),
            failures=int(rng.random() < 0.05),
        )
        for a in told
        for b in told
        if a is not b
    )
    texts = (
        ("peer_joined", "peer ann's laptop joined"),
        ("round", "round 41  step 600  loss 1.701  5,210 tok/s"),
        ("peer_suspect", "peer peer-3 (stage 0) is slow to answer: no heartbeat for 2.3 s"),
        ("checkpoint", "checkpoint of stage 2, 12.3 MB"),
        ("held-out", "held-out loss 1.723"),
        ("moving", "stage 2 needs this peer more than stage 0"),
    )
    events = tuple(
        parts.EventRow(
            number=n,
            at=at - 200 + 5 * n,
            kind=kind,
            peer=rows[n % len(rows)].peer,
            name=rows[n % len(rows)].name,
            text=text,
        )
        for n in range(40)
        for kind, text in (texts[n % len(texts)],)
    )
    return Snapshot(
        at=at,
        me=own(),
        verdict=parts.Verdict(
            state="training",
            text=f"Training. Stage {stages - 2} has one replica: one loss away from stopping.",
            findings=(
                parts.Finding(
                    kind="lone-replica", text="Two peers keep a copy of its stage.", stage=stages - 2
                ),
                parts.Finding(
                    kind="hung",
                    text="peer-3 answers, but its lane has stood still for 12 s.",
                    peer=rows[2].peer if len(rows) > 2 else "",
                    name="peer-3",
                ),
            ),
        ),
        run=parts.Run(
            name="tiny-stories-125m",
            run_id="ab" * 32,
            stages=stages,
            model_layers=4 * stages,
            tokens=4_000_000,
            goal_tokens=10_000_000,
            eta_s=7_240.0,
            learning_rate=4e-4,
            inner_steps=50,
            height=41,
        ),
        loss=loss,
        markers=markers,
        throughput=parts.Throughput(
            now=5_210.0,
            hour=4_870.0,
            best=6_030.0,
            lost=(
                parts.Lost(what="waiting", share=0.21, text="lanes wait for work"),
                parts.Lost(what="redone", share=0.013, text="micro-batches done again"),
            ),
        ),
        stages=columns,
        peers=tuple(rows),
        rounds=rounds,
        links=links,
        compression=tuple(
            parts.Compression(
                stage=stage,
                contribution="int4",
                published="int8",
                bits_per_value=4.13,
                ratio=7.7,
                round_bytes=3_400_000,
                residual_norm=0.02,
                update_norm=0.41,
            )
            for stage in range(stages)
        ),
        churn=parts.Churn(
            joins=7,
            leaves=3,
            median_session_s=5_400.0,
            reroutes=11,
            reroute_p50_s=0.18,
            reroute_p95_s=0.74,
            redone_share=0.013,
        ),
        checkpoints=parts.Checkpoints(
            at=at - 340,
            age_s=340.0,
            path="/home/ann/.local/share/shoal/checkpoints/41",
            bytes=140 << 20,
            heights=(40, 41, 40, 41),
            stages={str(s): 41 for s in range(stages)},
        ),
        trust=parts.Trust(
            revocation_version=2,
            refusals={"no certificate": 12, "revoked": 3},
            refused={rows[1].peer: 1},
            repaired_parts=2,
        ),
        coordinator=parts.Coordinator(
            pushing=len(told),
            events_taken=4123,
            history="kept for 30 days",
            history_bytes=18 << 20,
            cpu_share=0.043,
            memory_bytes=410 << 20,
        ),
        events=events,
    )


def _member(row: parts.Peer, rng: random.Random) -> parts.RoundMember:
    phases, start_s = [], 0.0
    for name, seconds in PHASES:
        phases.append(
            parts.Phase(name=name, start_s=start_s, seconds=(took := seconds * rng.uniform(0.6, 1.4)))
        )
        start_s += took
    return parts.RoundMember(peer=row.peer, name=row.name, bytes_out=1_100_000, phases=tuple(phases))


async def recorded(folder: Path, ended: float) -> tuple[History, list[Snapshot]]:
    """Ten minutes of a run until `ended`, a moment every 20 s; in the seventh a replica was lost."""
    history = History(Archive(folder / "history.sqlite"), inline, lambda: ended)
    now = full_snapshot(at=ended)
    lost = peer_row(77, 2, random.Random(7), name="lost-later")
    moments = []
    for number in range(31):
        at = ended - 20.0 * (30 - number)
        run = replace(now.run, tokens=now.run.tokens - 40_000 * (30 - number), height=41 - (30 - number) // 5)
        then = replace(now, at=at, run=run)
        if number < 20:
            verdict = parts.Verdict(
                state="training", level="ok", text="Training. Every stage has two replicas."
            )
            then = replace(then, peers=(*now.peers, lost), verdict=verdict)
        moments.append(then)
        history.frame(then)
        history.sample("tokens_per_s", at, 4000.0 + 30.0 * number)
        row = parts.EventRow(
            number=number, at=at, kind="note", peer="me", name="owner", text=f"note {number}"
        )
        history.add(Entry(row=row, process=1, theirs=number))
        await history.flush()
    return history, moments


@dataclass
class FakeDaemon:
    """Answers the page as an owner's daemon would, and remembers what it was asked to do."""

    snapshot: Snapshot
    did: list[dict[str, Any]] = field(default_factory=list)
    events: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    paused: bool = False
    logins: int = 0
    disk_full: bool = False
    exported: dict[str, Any] = field(default_factory=dict)
    recorded: History | None = None  # what the scrubber goes back through
    hidden: frozenset[str] = frozenset()  # actions that it has no more
    page: Dashboard | None = None

    async def page_link(self) -> str:
        """A new login link."""
        assert self.page is not None
        return self.page.link()

    @property
    def actions(self) -> dict[str, Action]:
        return {
            "snapshot": self._snapshot,
            "order": self._order,
            "orders": self._orders,
            "tokens": self._tokens,
            "token_create": self._create,
            "token_revoke": self._order,
            "history": self._history,
            "checkpoint_export": self._export,
            "checkpoint_exported": self._exported,
            "generate_start": self._start,
            "generate_more": self._more,
            "generate_stop": self._stop,
        }

    async def _snapshot(self, request: Mapping[str, Any]) -> object:
        return self.snapshot.to_json()

    async def _order(self, request: Mapping[str, Any]) -> object:
        self.did.append(dict(request))
        self.paused = request.get("what") == "pause" or (self.paused and request.get("what") != "resume")
        return {
            "number": len(self.did),
            "at_unix_s": NOW,
            "text": f"{request.get('what', request['do'])}: done",
        }

    async def _orders(self, request: Mapping[str, Any]) -> object:
        entries = [
            {
                "number": n,
                "at_unix_s": NOW,
                "who": asked.get("who", ""),
                "what": asked.get("what", asked["do"]),
                "text": "done",
            }
            for n, asked in reversed(list(enumerate(self.did)))
        ]
        values = {"inner.learning_rate": 4e-4, "outer.inner_steps": 50}
        return {
            "kinds": ["pause", "resume", "stop", "checkpoint", "set", "drain", "kick", "ban"],
            "orders": entries,
            "total": len(entries),
            "state": "paused" if self.paused else "running",
            "version": 1,
            "values": values,
        }

    async def _tokens(self, request: Mapping[str, Any]) -> object:
        return self.tokens

    async def _create(self, request: Mapping[str, Any]) -> object:
        made = {
            "id": f"{len(self.tokens):08x}",
            "name": request["name"],
            "roles": request["roles"],
            "not_after": NOW + request["ttl_s"],
        }
        self.tokens.append({**made, "state": "good"})
        return {**made, "token": "shoal1" + "x" * 1200}

    async def _history(self, request: Mapping[str, Any]) -> object:
        if self.disk_full:
            raise StorageError("cannot write the history: no space left on device")
        if self.recorded is not None and request["what"] in ("span", "moment", "series"):
            return await self.recorded.ask(dict(request))
        rows = [
            {
                "peer": peer.peer,
                "name": peer.name,
                "tokens": peer.tokens,
                "uptime_s": peer.uptime_s,
                "micro_batches": peer.micro_batches,
                "first_at": NOW - 1e5,
                "last_at": NOW,
            }
            for peer in self.snapshot.peers
        ]
        rates = [(NOW - 600 * i, 5000 + 600 * math.sin(i / 9)) for i in range(100, 0, -1)]
        return {"contributors": rows, "points": rates, "events": [{"number": 1, "text": "left"}]}

    async def _export(self, request: Mapping[str, Any]) -> object:
        self.exported = {"path": "/home/ann/exports/000041-whole", "bytes": 7}
        return {"running": True}

    async def _exported(self, request: Mapping[str, Any]) -> object:
        return {"running": False, **self.exported}

    async def _start(self, request: Mapping[str, Any]) -> object:
        return {"session": "1"}

    async def _more(self, request: Mapping[str, Any]) -> object:
        return {"text": "add(a, b):\n    return a + b\n", "done": True, "note": "13 tokens in 0.4 s"}

    async def _stop(self, request: Mapping[str, Any]) -> object:
        return {}


@contextlib.asynccontextmanager
async def served(
    folder: Path, daemon: FakeDaemon, options: DashboardOptions | None = None
) -> AsyncIterator[str]:
    """The page's process over `daemon`; yields the first login link."""
    control = folder / "control.sock"

    def note(kind: str, fields: Mapping[str, object]) -> None:
        daemon.events.append((kind, fields))

    options = options or DashboardOptions(host="127.0.0.1", port=0)
    async with dashboard(options, control, note) as page:
        assert page is not None
        daemon.page = page
        redeem = page.actions["dashboard_login"]

        async def counted(request: Mapping[str, Any]) -> object:
            daemon.logins += 1
            return await redeem(request)

        class Shown(dict[str, Action]):
            """Without what is hidden now."""

            def __iter__(self) -> Iterator[str]:
                return iter([name for name in self.keys() if name not in daemon.hidden])

            def __getitem__(self, name: str) -> Action:
                if name in daemon.hidden:
                    raise KeyError(name)
                return super().__getitem__(name)

        actions = Shown(daemon.actions | page.actions | {"dashboard_login": counted})
        async with serve_control(control, actions):
            running = asyncio.create_task(page.run())
            try:
                while not daemon.events:
                    await asyncio.sleep(0)
                yield str(daemon.events[0][1]["url"])
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
