"""A swarm of real processes to break: `shoal up`, `shoal join`, sockets, TLS, DHT, all on loopback.

A watcher asks every peer for its status and its ledger a few times a second and keeps the last answers, so
that those of a peer killed later are known. Ledgers and logs only grow: what two peers said at different
times can be compared. An `Auditor`, a member of the swarm inside the test, asks drivers what they decided.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from forked import fork_shoal

from shoal.node.control import ask
from shoal.node.demo.measure import Heads
from shoal.node.demo.processes import JsonObject, Launched, PeerProcess
from shoal.node.owner.home import VOLUNTEER_TTL_S, OwnerHome
from shoal.node.paths import control_sockets
from shoal.node.presence import Listening, Presence, present
from shoal.protocol.admission import JoinToken
from shoal.protocol.errors import NetworkError, ShoalError
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.transport import call
from shoal.training import spec_text
from shoal.training.methods import at_stage
from shoal.training.pipeline.messages import APPLIED, Link, MicroBatch, QueryChain, Verdict
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

DECISIONS = "decisions.jsonl"
START_S = 150.0  # two cores, four imports of torch, and whatever else the machine does
POLL_S = 0.6  # a look costs a peer and the watcher as much as some training does
HOST = "127.0.0.1"
_EVENTS_TOLD = 8
_ASKED_AT_ONCE = 8
_MISSING_TOLD = 5
Id = tuple[str, int]  # "driver/incarnation" and number of a micro-batch
T = TypeVar("T")


def swarm_spec(corpus: Path, stages: int, rebalance_window_s: float = 0.0) -> RunSpec:
    """The tiny template on data that needs no cache of the user's; a round every second or two."""
    values = TEMPLATES["tiny"].model_dump()
    values["run"]["name"] = f"swarm-{stages}"
    values["data"] |= {"source": "text", "paths": (str(corpus),)}
    values["stages"] |= {"count": stages, "rebalance_window_s": rebalance_window_s}
    values["outer"] |= {"inner_steps": 15, "part_bytes": 1 << 18, "snapshot_every": 4}
    return RunSpec.model_validate(values)


def write_corpus(path: Path) -> Path:
    """A megabyte of the standard library's own source."""
    folder = Path(asyncio.__file__).parent
    path.write_text("\n".join(source.read_text() for source in sorted(folder.glob("*.py"))))
    return path


class Peer(PeerProcess):
    """One process, forked from a nursery, and the last it said."""

    def __init__(self, name: str, folder: Path, swarm: Swarm) -> None:
        super().__init__(name, folder, swarm.heard)
        self.events: list[JsonObject] = []
        self.last_status: JsonObject = {}
        self.last_ledger: frozenset[Id] = frozenset()
        self.frozen = False
        self.was_frozen = False
        self.killed = False

    @property
    def alive(self) -> bool:
        """Whether its process runs; false at once when it was killed."""
        return super().alive and not self.killed

    @property
    def training(self) -> bool:
        """Whether it runs, is not frozen, and went online."""
        return self.alive and not self.frozen and any(event["event"] == "online" for event in self.events)

    async def poll(self) -> bool:
        """Ask for status and ledger; False if it does not answer."""
        if self.frozen:
            return False
        for path in control_sockets(self.folder / "data"):
            with contextlib.suppress(ShoalError):
                self.last_status = await ask(path, "status")
                self.last_ledger = _ids(await ask(path, "ledger"))
                return True
        return False

    async def _launch(self, *arguments: str, errors: IO[bytes], **variables: str) -> Launched:
        return await fork_shoal(*arguments, errors=errors, **variables)

    def kill(self) -> float:
        self.killed = True
        return super().kill()

    def signal(self, number: signal.Signals) -> None:
        """To its whole process group, as a terminal does with Ctrl-C."""
        self.frozen = number == signal.SIGSTOP or (self.frozen and number != signal.SIGCONT)
        self.was_frozen |= self.frozen
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def pid(self) -> int:
        return int(next(event["pid"] for event in self.events if event["event"] == "starting"))

    async def ended(self, timeout_s: float) -> int:
        """Its exit code, once it has ended by itself."""
        await until(lambda: not self.alive, f"the end of {self.name}", timeout_s)
        assert self.exit_code is not None
        return self.exit_code

    def timeline(self) -> str:
        """When it came to what, in seconds since its start."""
        wanted = ("starting", "peer_joined", "plan", "online", "round")
        first = {event["event"]: event["at"] for event in reversed(self.events)}
        times = (f"{kind} {first[kind] - self.started_unix_s:.1f}" for kind in wanted if kind in first)
        return f"{self.name}: {', '.join(times)}"

    def dropped(self, id_: Id) -> bool:
        """Whether it said that it gave a micro-batch up undecided."""
        wanted = ("dropped", id_[0].partition("/")[0], id_[1])
        return any(wanted == (e["event"], e.get("driver"), e.get("micro_batch")) for e in self.events)

    def farewell(self) -> JsonObject:
        """Its `left` event."""
        return next(event for event in reversed(self.events) if event["event"] == "left")

    def story(self) -> str:
        """For a failed test: what became of it."""
        state = "alive" if self.alive else f"ended with {self.exit_code}"
        rare = [event for event in self.events if event["event"] not in ("held-out", "round", "round-open")]
        told = "".join(f"\n    {json.dumps(event)[:300]}" for event in rare[-_EVENTS_TOLD:])
        return (
            f"{self.name} (stage {self.stage}, {self.peer_id}) {state}{told}\n  stderr: {self.last_words()}"
        )


class Swarm:
    """One run on this machine. Use as `async with`; its peers end with it."""

    def __init__(self, folder: Path, spec: RunSpec, *, decisions: bool = False) -> None:
        self.folder = folder
        self.spec = spec
        self.options: tuple[str, ...] = ()  # more of them for every peer
        self._decisions = decisions  # whether peers write theirs down
        self.poll_s = POLL_S  # between two looks of the watcher at a peer
        self.heads = Heads()
        self.peers: list[Peer] = []
        self.taken_along: dict[Id, str] = {}  # micro-batches gone with a lost replica -> its name
        self.hidden: dict[Id, str] = {}  # dropped as their driver stood still, or their replica -> its name
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Swarm:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._watching = asyncio.create_task(self._watch(), name="watch the swarm")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for peer in self.peers:
            peer.kill()
        await asyncio.gather(*(peer.stop() for peer in self.peers))

    # --- making

    async def found(self, *options: str) -> Peer:
        """The owner alone, as soon as others can join. `options`: more of its `shoal up`."""
        owner = self._new_peer("owner")
        path = self.folder / "run.toml"
        path.write_text(spec_text.render(self.spec))
        await owner.start("up", str(path), "--listen", HOST, "--stage", "0", *options, *self._options(owner))
        await owner.event("invitation", START_S)
        return owner

    async def start(self, replicas: int, *owners: str) -> None:
        """The owner and as many volunteers as fill every stage; returns when all are online and train.

        `owners`: more options of its `shoal up`.
        """
        owner = await self.found(*owners)
        wanted = [stage for stage in range(self.spec.stages.count) for _ in range(replicas)][1:]
        await asyncio.gather(*(self.join(stage=stage) for stage in wanted))
        await owner.event("online", START_S)
        await self.until_training(self.peers)

    async def join(self, stage: int | None = None, token: Path | None = None) -> Peer:
        """One more volunteer, online; where it is needed most unless told."""
        peer = self._new_peer(f"peer-{len(self.peers)}")
        token = token or await self.issue_token(peer.name)
        where = () if stage is None else ("--stage", str(stage))
        await peer.start("join", f"@{token}", "--listen", HOST, *self._options(peer), *where)
        try:
            await peer.event("online", START_S)
        except NetworkError as error:
            raise NetworkError("\n".join([str(error), *(each.story() for each in self.peers)])) from error
        return peer

    def _options(self, peer: Peer) -> tuple[str, ...]:
        decisions = ("--decisions", str(peer.folder / DECISIONS)) if self._decisions else ()
        return *self.options, *decisions

    @property
    def decisions(self) -> list[Path]:
        """What the peers saw and decided, a file each."""
        return [path for peer in self.peers if (path := peer.folder / DECISIONS).exists()]

    async def issue_token(self, name: str, role: str = "trainer") -> Path:
        """A token file; the owner's daemon need not run."""
        home = OwnerHome.choose(self.peers[0].folder / "data", None)
        token = home.issue((Role(role),), VOLUNTEER_TTL_S, name, time.time())
        path = self.folder / f"{name}.token"
        path.touch(0o600)
        path.write_text(token.encode())
        return path

    @contextlib.asynccontextmanager
    async def auditor(self) -> AsyncIterator[Auditor]:
        """A member of the swarm that only asks."""
        token = JoinToken.parse((await self.issue_token("auditor")).read_text())
        folder = self.folder / "auditor"
        key = await asyncio.to_thread(PeerKey.load_or_create, folder / "identity.key")
        async with present(token, key, folder, Listening(), name="auditor") as presence:
            presence.announce("observing", ())
            yield Auditor(presence)
            await presence.members.leave("done")

    def _new_peer(self, name: str) -> Peer:
        peer = Peer(name, self.folder / name, self)
        self.peers.append(peer)
        return peer

    # --- looking

    def replicas(self, stage: int) -> list[Peer]:
        """Those that train now."""
        return [peer for peer in self.peers if peer.stage == stage and peer.training]

    def everybody(self, stage: int) -> list[Peer]:
        """All that ever held a stage, the dead included."""
        return [peer for peer in self.peers if peer.stage == stage]

    def ledger(self, stage: int) -> frozenset[Id]:
        """All that replicas of a stage, dead or alive, are known to have applied."""
        return frozenset[Id]().union(*(peer.last_ledger for peer in self.everybody(stage)))

    def applied_twice(self) -> list[str]:
        """Micro-batches in the ledgers of two replicas of one stage."""
        found = []
        for stage in range(self.spec.stages.count):
            counts = Counter(id_ for peer in self.everybody(stage) for id_ in peer.last_ledger)
            found += [f"stage {stage}: {id_}" for id_, count in counts.items() if count > 1]
        return found

    async def poll(self, peers: Iterable[Peer] | None = None) -> None:
        """Ask now."""
        wanted = list(self.peers if peers is None else peers)
        await asyncio.gather(*(peer.poll() for peer in wanted if peer.alive))
        for peer in wanted:
            training = peer.last_status.get("training")
            if training:  # of the stage that it held when it answered; it may have moved since
                state = (str(training["head"]), str(training["state_root"]))
                self.heads.add(peer.peer_id, int(training["stage"]), int(training["height"]), *state)

    async def until_training(self, peers: Iterable[Peer], timeout_s: float = START_S) -> float:
        """Returns when each has applied micro-batches begun since now; in how many seconds."""
        peers = list(peers)
        await self.poll(peers)
        begun_before = self.spec.inner.in_flight * max(1, len(self.replicas(0)))
        enough = {peer.name: len(peer.last_ledger) + begun_before for peer in peers}
        now_s = time.monotonic()

        def grown() -> bool:
            return all(len(peer.last_ledger) > enough[peer.name] for peer in peers)

        await until(grown, f"progress of {', '.join(enough)}", timeout_s, lambda: self.poll(peers))
        return time.monotonic() - now_s

    async def until_compared(self, peers: list[Peer], timeout_s: float = 120.0) -> int:
        """Returns a height, later than now, at which all of `peers`, of one stage, told their state."""
        (stage,) = {peer.stage for peer in peers}
        assert stage is not None
        ids = [peer.peer_id for peer in peers]
        before = max(self.heads.latest.get((stage, id_), 0) for id_ in ids)

        def common() -> int:
            return self.heads.common_height(stage, ids) or 0

        what = f"a height after {before} at which {', '.join(peer.name for peer in peers)} all were"
        await until(lambda: common() > before, what, timeout_s)
        return common()

    def heard(self, process: PeerProcess, event: JsonObject) -> None:
        """An event that a peer printed."""
        peer = next(peer for peer in self.peers if peer is process)
        peer.events.append(event)
        if event.get("event") == "round" and "head" in event:
            state = (str(event["head"]), str(event["state_root"]))
            self.heads.add(peer.peer_id, int(event["stage"]), int(event["height"]), *state)

    def story(self) -> str:
        """For a failed test: the last words of all."""
        return "\n".join(peer.story() for peer in self.peers)

    async def settled(self, auditor: Auditor, timeout_s: float = 120.0) -> frozenset[Id]:
        """What living drivers have decided by now, once each of it is applied at stage 1 or accounted for.

        Raises NetworkError with what is missing.
        """
        drivers = self.replicas(0)
        await self.poll(drivers)
        decided = frozenset[Id]().union(*(driver.last_ledger for driver in drivers))
        missing = decided

        async def look() -> None:
            nonlocal missing
            await self.poll(self.replicas(1))
            missing = await self.account(auditor, missing)

        try:
            await until(lambda: not missing, "every decided micro-batch at stage 1", timeout_s, look)
        except NetworkError as error:
            chains = await auditor.chains(sorted(missing)[:_MISSING_TOLD])
            raise NetworkError(f"{error}\n{len(missing)} are missing, among them {chains}") from None
        return decided

    async def account(self, auditor: Auditor, decided: frozenset[Id]) -> frozenset[Id]:
        """Those of `decided` that no ledger of stage 1 shows and nothing excuses.

        Exact: the driver is asked for the chain it decided. What names a replica that is no more goes into
        `taken_along`. What names one that said it dropped it goes into `hidden`, if that one or the driver
        was frozen at some time. Drivers remember their last 4096 chains: long runs ask now and then.
        """
        unseen = decided - self.ledger(1) - self.taken_along.keys() - self.hidden.keys()
        for id_, chain in (await auditor.chains(unseen)).items():
            holder = self._peer(next((link.peer for link in chain if link.stage == 1), ""))
            driver = self._peer(id_[0].partition("/")[0])
            if not holder.alive:
                self.taken_along[id_] = holder.name
            elif holder.dropped(id_) and (holder.was_frozen or driver.was_frozen):
                self.hidden[id_] = holder.name
        applied = self.ledger(1)  # the last ledgers of who left may have come meanwhile
        for excused in (self.taken_along, self.hidden):
            for id_ in excused.keys() & applied:
                del excused[id_]
        return unseen - applied - self.taken_along.keys() - self.hidden.keys()

    def _peer(self, peer_id: str) -> Peer:
        return next(peer for peer in self.peers if peer.peer_id == peer_id)

    async def _watch(self) -> None:
        """Each peer is polled by itself: one that stands still must not hide the others."""
        polls: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for peer in self.peers:
                    if peer.name not in polls or polls[peer.name].done():
                        polls[peer.name] = asyncio.create_task(self.poll([peer]))
                await asyncio.sleep(self.poll_s)
        finally:
            for task in polls.values():
                task.cancel()
            await asyncio.gather(*polls.values(), return_exceptions=True)


class Auditor:
    """Asks drivers, as a hop would, which chain they decided for a micro-batch."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence

    async def chains(self, ids: Iterable[Id]) -> dict[Id, tuple[Link, ...]]:
        """The decided chain of each; those whose driver does not answer are left out."""
        slots = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def one(id_: Id) -> tuple[Id, tuple[Link, ...]]:
            driver, _, incarnation = id_[0].rpartition("/")
            query = QueryChain(MicroBatch(PeerId(driver), int(incarnation), id_[1]))
            async with slots:
                try:
                    answer = await call(
                        self._presence.transport,
                        PeerId(driver),
                        at_stage(0, "commit"),
                        query,
                        Verdict,
                        timeout_s=5.0,
                    )
                except ShoalError:
                    return id_, ()
            verdict: Verdict = answer.header
            return id_, verdict.chain if verdict.decision == APPLIED else ()

        found = await asyncio.gather(*(one(id_) for id_ in ids))
        return {id_: chain for id_, chain in found if chain}


class Shared:
    """A swarm that several tests share: it lives on one loop, and each test runs on that for a while."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self._runner = asyncio.Runner()

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Run a test's story; if it fails, its error carries the last words of every peer."""
        try:
            return self._runner.run(story)
        except BaseException as error:
            error.add_note(self.swarm.story())
            raise

    def __enter__(self) -> Shared:
        self.run(self.swarm.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._runner.run(self.swarm.__aexit__())
        finally:
            self._runner.close()


async def until(
    holds: Callable[[], bool],
    what: str,
    timeout_s: float,
    look: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Returns when `holds()`; `look` refreshes what it sees. Raises NetworkError."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                if look is not None:
                    await look()
                if holds():
                    return
                await asyncio.sleep(POLL_S / 3)
    except TimeoutError:
        raise NetworkError(f"waited {timeout_s:g} s in vain for {what}") from None


def _ids(ledger: dict[str, list[tuple[int, int]]]) -> frozenset[Id]:
    return frozenset(
        (driver, number)
        for driver, spans in ledger.items()
        for start, stop in spans
        for number in range(start, stop)
    )
