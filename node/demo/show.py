"""The demo itself: start a swarm, watch it, kill a peer, let another come, and have the model write.

    0 s          owner and peers up, training begins
    a third      SIGKILL to a peer that is not the owner's; how long until its work goes elsewhere?
    at once      a new peer joins; how long until it holds the group's log head and contributes?
    the end      heads compared, text generated, everything stopped

All figures come from the peers' own events and statuses, and from the clock of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from shoal.node.demo.measure import Figures, micro_batches
from shoal.node.demo.processes import JsonObject, PeerProcess, run_shoal
from shoal.node.demo.screen import Screen
from shoal.node.demo.watch import Watch
from shoal.node.loop import repeated
from shoal.protocol.errors import NetworkError, ShoalError

PROMPT = "def "
NEW_TOKENS = 64
# When to give up; the machine may have other work to do besides.
START_S = 120.0  # for everybody to be online
REROUTE_S = 30.0
REJOIN_S = 150.0
HEADS_S = 90.0
GENERATE_S = 150.0
_FAST_POLL_S = 0.1
_HOST = "127.0.0.1"
_REROUTE_GRACE_S = 2.0  # a micro-batch on its way to the dead peer needs this long to tell of its detour
_FAILED = 1
_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """See `shoal demo --help`."""

    stages: int
    replicas: int
    seconds: float
    kill: bool


def run_demo(options: DemoOptions, as_json: bool) -> int:
    """The demo's exit code: 0 if every figure was measured and the run recovered."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    screen = Screen(as_json)
    demo = Demo(options, folder, screen)
    problems: list[str] = []
    try:
        with screen.running():
            asyncio.run(demo.run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        screen.tell("interrupted", f"interrupted; logs are in {folder}")
        return _INTERRUPTED
    except ShoalError as error:
        problems.append(str(error))
    problems += demo.figures.failures()
    for problem in problems:
        screen.tell("problem", problem)
    if problems:
        screen.tell("logs", f"the demo did not hold; logs are in {folder}", folder=str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
    screen.result(demo.figures.summary(), PROMPT)
    return _FAILED if problems else 0


class Demo:
    """One demo. `figures` holds what was measured so far, whatever happens."""

    def __init__(self, options: DemoOptions, folder: Path, screen: Screen) -> None:
        self.figures = Figures(options.stages, options.kill)
        self._options = options
        self._folder = folder
        self._screen = screen
        self._watch = Watch(options.stages, options.seconds, screen)
        self._owner = self._peer("owner")
        self._victim: PeerProcess | None = None

    async def run(self) -> None:
        """From start to the last figure. Raises ShoalError where it cannot go on."""
        if (task := asyncio.current_task()) is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await self._start()
            watching = asyncio.create_task(self._watch.run(), name="watch")
            try:
                await self._act()
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Drivers first: what they still have under way needs the later stages."""
        stages = {peer.stage if peer.stage is not None else 0 for peer in self._watch.peers}
        for stage in sorted(stages):
            await asyncio.gather(*(peer.stop() for peer in self._watch.peers if peer.stage in (stage, None)))

    # --- acts

    async def _start(self) -> None:
        options = self._options
        count = options.stages * options.replicas
        self._screen.tell("start", f"starting {count} peers for {options.stages} stages on this machine")
        path = self._folder / "run.toml"
        await asyncio.to_thread(_write_spec, path, options.stages)
        await self._owner.start("up", str(path), "--listen", _HOST)
        await self._owner.event("invitation", START_S)
        await asyncio.gather(*(self._join(f"peer-{number}") for number in range(1, count)))
        await asyncio.gather(*(peer.event("online", START_S) for peer in self._watch.peers))
        self._watch.begin()

    def _peer(self, name: str) -> PeerProcess:
        peer = PeerProcess(name, self._folder / name, self._watch.heard)
        self._watch.peers.append(peer)
        return peer

    async def _join(self, name: str) -> PeerProcess:
        """Start a peer the way a volunteer would, with a token of its own."""
        token = await self._token("trainer", name)
        peer = self._peer(name)
        await peer.start("join", f"@{token}", "--listen", _HOST)
        return peer

    async def _token(self, role: str, name: str) -> Path:
        created = await run_shoal(
            "token", "create", "--role", role, "--name", name, "--json",
            "--data-dir", str(self._owner.folder / "data"), timeout_s=START_S,
        )  # fmt: skip
        path = self._folder / f"{name}.token"
        await asyncio.to_thread(_write_secret, path, str(created["token"]))
        return path

    async def _act(self) -> None:
        options = self._options
        if options.kill:
            await self._until(options.seconds / 3)
            await self._kill_and_replace()
        await self._until(options.seconds)
        self._measure_progress()
        await self._compare_heads()
        self._screen.tell("generate", "the model writes")
        await self._generate()

    async def _until(self, elapsed_s: float) -> None:
        await asyncio.sleep(max(0.0, self._watch.started_s + elapsed_s - time.monotonic()))

    async def _kill_and_replace(self) -> None:
        victim = self._victim = self._choose_victim()
        if victim is None or victim.stage is None:
            raise NetworkError("no stage has a replica to spare\nuse --replicas 2 or more, or --no-kill")
        survivors = [peer for peer in self._watch.peers if peer.stage == victim.stage and peer is not victim]
        before = {peer.name: micro_batches(self._watch.statuses[peer.name]) for peer in survivors}
        killed_unix_s = victim.kill()
        self.figures.killed = victim.name
        self._screen.tell(
            "kill", f"killed {victim.name} of stage {victim.stage} with SIGKILL", peer=victim.name
        )
        await asyncio.gather(
            self._measure_reroute(victim.stage, killed_unix_s, survivors, before), self._measure_rejoin()
        )

    def _choose_victim(self) -> PeerProcess | None:
        """Of the last stage that can spare one: there, micro-batches are on their way to it."""
        by_stage: dict[int, list[PeerProcess]] = {}
        for peer in self._watch.peers:
            if peer.stage is not None and peer.alive:
                by_stage.setdefault(peer.stage, []).append(peer)
        for stage in sorted(by_stage, reverse=True):
            candidates = [peer for peer in by_stage[stage] if peer is not self._owner]
            if len(by_stage[stage]) > 1 and candidates:
                return candidates[-1]
        return None

    # --- measuring

    async def _measure_reroute(
        self, stage: int, killed_unix_s: float, survivors: list[PeerProcess], before: dict[str, int]
    ) -> None:
        """From the kill to the first micro-batch that went to another replica instead.

        If none was on its way to the dead one, to the first that a survivor of the stage finished since.
        """
        deadline_s = time.monotonic() + REROUTE_S
        fallback_s: float | None = None
        while time.monotonic() < deadline_s:
            rerouted = [at for at, where in self._watch.reroutes if where == stage and at > killed_unix_s]
            if rerouted:
                self.figures.reroute_s = min(rerouted) - killed_unix_s
                break
            if fallback_s is None and await self._progressed(survivors, before):
                fallback_s = time.time() - killed_unix_s
            if fallback_s is not None and time.time() - killed_unix_s > fallback_s + _REROUTE_GRACE_S:
                self.figures.reroute_s = fallback_s
                break
            await asyncio.sleep(_FAST_POLL_S)
        if self.figures.reroute_s is not None:
            text = f"work goes on without it after {self.figures.reroute_s:.2f} s"
            self._screen.tell("reroute", text, reroute_s=self.figures.reroute_s)

    async def _progressed(self, survivors: list[PeerProcess], before: dict[str, int]) -> bool:
        for peer in survivors:
            status = await peer.status()
            if status is not None and micro_batches(status) > before[peer.name] + 1:
                return True
        return False

    async def _measure_rejoin(self) -> None:
        """From a new peer's start to an entry that lists it, with the group's head in its log."""
        newcomer = await self._join(f"peer-{len(self._watch.peers)}")
        deadline_s = time.monotonic() + REJOIN_S
        await newcomer.event("online", REJOIN_S)
        while time.monotonic() < deadline_s:
            status = await newcomer.status()
            if status is not None and self._is_level(newcomer, status):
                self.figures.rejoin_s = time.time() - newcomer.started_unix_s
                text = f"{newcomer.name} holds the head of stage {newcomer.stage} and contributes"
                self._screen.tell(
                    "rejoin", f"{text} after {self.figures.rejoin_s:.1f} s", rejoin_s=self.figures.rejoin_s
                )
                return
            await asyncio.sleep(_FAST_POLL_S)

    def _is_level(self, newcomer: PeerProcess, status: JsonObject) -> bool:
        """Whether an entry lists it and its log is as long as any other's of its stage."""
        training = status["training"]
        stage = newcomer.stage
        if stage is None or not training or training["outer"]["listed"] < 1:
            return False
        self._watch.take_status(newcomer, status)
        return int(training["height"]) >= self._watch.heads.group_height(stage, newcomer.peer_id)

    def _measure_progress(self) -> None:
        figures = self.figures
        figures.seconds = time.monotonic() - self._watch.started_s
        figures.loss_first, figures.loss_last = self._watch.losses.first, self._watch.losses.last
        figures.rounds = self._watch.heads.group_height(0, "")
        figures.tokens = self._watch.tokens()
        figures.replicas = self._watch.replicas()
        self._measure_loops()
        for peer in self._watch.peers:
            if not peer.alive and peer is not self._victim:
                figures.stopped.append(f"{peer.name} stopped by itself ({peer.exit_code})")

    def _measure_loops(self) -> None:
        """The longest callback and the lag of every peer's event loop."""
        for name, status in self._watch.statuses.items():
            loop = status["loop"]
            text = (
                f"{name}: longest callback {loop['callback_worst_ms']:.1f} ms CPU ({loop['callback_worst']})"
            )
            self._screen.tell("loop", f"{text}, lag p99 {loop['lag_p99_ms']:.1f} ms", peer=name, **loop)
        loops = {name: status["loop"] for name, status in self._watch.statuses.items()}
        self.figures.slow_callbacks = repeated(loops)

    async def _compare_heads(self) -> None:
        """All live replicas of each stage, at a height that each of them was seen at."""
        deadline_s = time.monotonic() + HEADS_S
        groups: dict[int, list[str]] = {}
        for peer in self._watch.peers:
            if peer.alive and peer.stage is not None:
                groups.setdefault(peer.stage, []).append(peer.peer_id)
        while time.monotonic() < deadline_s:
            common = {stage: self._watch.heads.common_height(stage, peers) for stage, peers in groups.items()}
            if all(height is not None and height > 0 for height in common.values()):
                break
            await asyncio.sleep(_FAST_POLL_S)
        else:
            return
        differences = self._watch.heads.differences()
        for difference in differences:
            self._screen.tell("difference", difference)
        self.figures.heads_equal = not differences
        self._screen.tell("heads", f"anchors compared at heights {common}", heights=common)

    async def _generate(self) -> None:
        token = await self._token("inference", "writer")
        written = await run_shoal(
            "generate", f"@{token}", "-p", PROMPT, "--max-new-tokens", str(NEW_TOKENS),
            "--temperature", "0.7", "--seed", "1", "--json",
            "--data-dir", str(self._folder / "writer"), timeout_s=GENERATE_S,
        )  # fmt: skip
        self.figures.text = str(written["text"])


def _write_spec(path: Path, stages: int) -> None:
    from shoal.training.spec_text import render
    from shoal.training.templates import TEMPLATES

    tiny = TEMPLATES["tiny"]
    cut = tiny.stages.model_copy(update={"count": stages})
    path.write_text(render(tiny.model_copy(update={"stages": cut})))


def _write_secret(path: Path, text: str) -> None:
    with contextlib.suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)
    path.write_text(text)
