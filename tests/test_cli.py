"""The command line: what a user types, what comes back, and with which exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import typer
from rich.console import Console

from shoal.node import control, paths
from shoal.node.cli import inference
from shoal.node.cli.app import app, main
from shoal.node.cli.status_view import copies_text, status_view
from shoal.node.cli.units import duration_s, rate_bytes_per_s, rate_text, size_bytes
from shoal.node.control import CONNECTIONS, WAITING, ask, serve_control
from shoal.node.demo.measure import Figures, Heads, Losses
from shoal.node.events import sentence
from shoal.node.loop import LoopMeter, new_loop, repeated
from shoal.node.open_files import OPEN_FILES, raise_file_limit
from shoal.node.owner.home import OwnerHome
from shoal.node.signed_spec import SignedSpec
from shoal.node.view.parts import Stage
from shoal.node.view.snapshot import Own, Snapshot
from shoal.protocol.admission import JoinToken
from shoal.protocol.errors import (
    PeerUnreachable,
    RecordInvalid,
    ShoalError,
    SpecError,
    StorageError,
    UsageError,
)
from shoal.protocol.identity import Role
from shoal.training.recovery.lost_stage import Loss, told
from shoal.training.spec import RunSection, RunSpec

NOW = 1_900_000_000.0


class Answer(NamedTuple):
    code: int
    out: str
    errors: str


class Shoal(Protocol):
    def __call__(self, *arguments: object) -> Answer: ...


@pytest.fixture
def shoal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shoal:
    """Runs a command with a data folder of its own."""
    monkeypatch.setenv(paths.ENVIRONMENT_KEY, str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, errors = capsys.readouterr()
        return Answer(int(exit_.value.code or 0), out, errors)

    return run


@pytest.fixture
def home(tmp_path: Path) -> OwnerHome:
    """An owner whose swarm was up once, where the `shoal` fixture looks."""
    made = OwnerHome.of_run(tmp_path / "data", RunSpec(), NOW)
    made.keep_addresses(("/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWAddress",))
    return made


# --- init and plan


@pytest.mark.parametrize("template", ["tiny", "small", "125m", "1b"])
def test_every_template_is_written_and_planned(shoal: Shoal, tmp_path: Path, template: str) -> None:
    path = tmp_path / "run.toml"
    assert shoal("init", "--template", template, path).code == 0
    answer = shoal("plan", path, "--json")
    assert answer.code == 0
    plan = json.loads(answer.out)
    assert plan["parameters"] == sum(stage["parameters"] for stage in plan["stages"])
    assert all(stage["memory_bytes"] > 0 for stage in plan["stages"])


def test_every_command_speaks_json_but_the_one_that_talks(shoal: Shoal, tmp_path: Path) -> None:
    def silent(command: Any, name: str) -> list[str]:
        below = getattr(command, "commands", None)
        if below is not None:
            return [one for word, inner in below.items() for one in silent(inner, f"{name} {word}".strip())]
        options = {option for parameter in command.params for option in parameter.opts}
        return [] if "--json" in options else [name]

    assert silent(typer.main.get_command(app), "") == ["chat"]
    path = tmp_path / "run.toml"
    assert json.loads(shoal("init", path, "--json").out) == {"path": str(path), "template": "tiny"}
    assert json.loads(shoal("version", "--json").out).keys() == {"version"}


def test_init_leaves_an_existing_file_alone(shoal: Shoal, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mine")
    answer = shoal("init", path)
    assert answer.code == 2
    assert path.read_text() == "mine"


def test_an_unknown_key_is_refused_with_line_and_nearest_match(shoal: Shoal, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[inner]\nlearning_rte = 0.1\n")
    answer = shoal("plan", path)
    assert answer.code == 15
    assert "run.toml:2" in answer.errors
    assert "learning_rate" in answer.errors


# --- errors


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("join", "shoal1-tooshort"), 10, "cut off"),
        (("join", "nonsense"), 10, "shoal1-"),
        (("join", "@/nowhere/token"), 2, "/nowhere/token"),
        (("status",), 11, "shoal join"),
        (("leave",), 11, "shoal join"),
        (("token", "list"), 2, "shoal up"),
        (("plan", "/nowhere/run.toml"), 15, "shoal init"),
        (("dance",), 2, "dance"),
        (("up", "run.toml", "--memory", "lots"), 15, "run.toml"),
    ],
)
def test_a_refusal_has_a_reason_and_its_exit_code(
    shoal: Shoal, arguments: tuple[str, ...], code: int, says: str
) -> None:
    answer = shoal(*arguments)
    assert answer.code == code
    assert says in answer.errors
    assert "Traceback" not in answer.errors


def test_a_bug_is_kept_in_a_report_and_not_thrown_at_the_user(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(template: str, path: Path) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shoal.training.spec_file.write_template", broken)
    answer = shoal("init", tmp_path / "run.toml")
    assert answer.code == 70
    assert "Traceback" not in answer.errors
    (report,) = tmp_path.glob("shoal-report-*")
    assert "ZeroDivisionError: of ours" in report.read_text()


def test_a_token_on_the_command_line_never_reaches_a_message(shoal: Shoal, home: OwnerHome) -> None:
    text = home.issue((Role.TRAINER,), 60.0, "", NOW).encode()
    answer = shoal("join", text[:-5])
    assert answer.code == 10
    assert text[20:60] not in answer.out + answer.errors


def test_an_upload_limit_that_is_too_low_is_refused_by_name(shoal: Shoal, home: OwnerHome) -> None:
    token = home.issue((Role.TRAINER,), 60.0, "", NOW).encode()
    answer = shoal("join", token, "--upload", "128kbit")
    assert answer.code == 2
    assert "128 kbit/s" in answer.errors
    assert "--upload 600kbit" in answer.errors


def test_a_gateways_draft_that_is_none_is_told_before_anybody_is_asked(
    shoal: Shoal, home: OwnerHome, tmp_path: Path
) -> None:
    token = home.issue((Role.INFERENCE,), 60.0, "", NOW).encode()
    answer = shoal("serve", token, "--listen", "127.0.0.1:0", "--draft", tmp_path / "nothing")
    assert answer.code == 20
    assert str(tmp_path / "nothing") in answer.errors


def test_help_and_quick_commands_load_no_heavy_library() -> None:
    program = (
        "import sys; from shoal.node.cli import app; from shoal.node.cli import tokens, spec; "
        "sys.exit(bool({'torch', 'hivemind', 'grpc'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- tokens


def test_a_token_is_created_listed_and_revoked(shoal: Shoal, home: OwnerHome) -> None:
    created = json.loads(shoal("token", "create", "--name", "ada", "--ttl", "12h", "--json").out)
    token = JoinToken.parse(created["token"])
    assert token.roles == {Role.TRAINER}
    assert token.bootstrap == home.addresses()
    assert token.run_id == RunSpec().run_id()
    (listed,) = json.loads(shoal("token", "list", "--json").out)
    assert (listed["id"], listed["name"], listed["state"]) == (token.token_id, "ada", "good")
    assert shoal("token", "revoke", token.token_id).code == 0
    (listed,) = json.loads(shoal("token", "list", "--json").out)
    assert listed["state"] == "revoked"
    assert "ada" in shoal("token", "list").out


def test_a_token_nobody_issued_cannot_be_revoked(shoal: Shoal, home: OwnerHome) -> None:
    answer = shoal("token", "revoke", "00" * 8)
    assert answer.code == 2
    assert "token list" in answer.errors


def test_the_owners_files_are_private_and_survive_a_restart(tmp_path: Path, home: OwnerHome) -> None:
    token = home.own_token(NOW)
    assert {path.stat().st_mode & 0o077 for path in home.folder.iterdir()} == {0}
    again = OwnerHome.of_run(tmp_path / "data", RunSpec(), NOW + 5)
    assert again.key.root_der == home.key.root_der
    assert again.own_token(NOW + 5).token_id == token.token_id
    assert token.roles == {Role.OWNER, Role.TRAINER}


def test_several_runs_of_one_owner_are_told_apart(tmp_path: Path, home: OwnerHome) -> None:
    other = RunSpec(run=RunSection(name="other"))
    OwnerHome.of_run(tmp_path / "data", other, NOW)
    with pytest.raises(UsageError, match="--run"):
        OwnerHome.choose(tmp_path / "data", None)
    assert OwnerHome.choose(tmp_path / "data", "other").spec.spec == other
    assert OwnerHome.choose(tmp_path / "data", other.run_id().hex()[:6]).spec.spec == other


# --- the signed spec


def test_a_spec_is_taken_only_from_its_owner_and_for_its_run(home: OwnerHome) -> None:
    canonical, run_id, root = RunSpec().canonical(), home.key.run_id, home.key.root_der
    SignedSpec.verified(canonical, home.spec.signature, run_id, root)
    other = RunSpec(run=RunSection(name="other")).canonical()
    with pytest.raises(SpecError):
        SignedSpec.verified(other, home.spec.signature, run_id, root)
    with pytest.raises(RecordInvalid):
        SignedSpec.verified(canonical, home.key.sign(b"another label", canonical), run_id, root)


# --- paths


def test_two_daemons_never_share_an_identity(tmp_path: Path) -> None:
    with paths.PeerFolder.claim(tmp_path) as first:
        with paths.PeerFolder.claim(tmp_path) as second:
            assert first.identity_path != second.identity_path
        with paths.PeerFolder.claim(tmp_path) as third:
            assert third.path == second.path


def test_folders_are_private(tmp_path: Path) -> None:
    root = paths.data_root(tmp_path / "data")
    with paths.PeerFolder.claim(root) as folder:
        run = paths.run_folder(folder.path, bytes(32))
    assert {path.stat().st_mode & 0o777 for path in (root, folder.path, run)} == {0o700}


def test_a_data_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        paths.data_root(tmp_path / "file" / "data")


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("1.5h", 5400), ("7d", 604800), (" 2 w ", 1209600)])
def test_durations(text: str, value: float) -> None:
    assert duration_s(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("12GiB", 12 << 30), ("500MB", 500_000_000), ("4G", 4 * 10**9), ("512", 512), ("8b", 8)],
)
def test_sizes(text: str, value: int) -> None:
    assert size_bytes(text) == value


def test_rates_and_what_is_none() -> None:
    assert rate_bytes_per_s("20Mbit") == 2.5e6
    assert rate_bytes_per_s("1Gbit/s") == 1.25e8
    for text in ("600 kbit/s", "2.5 Mbit/s", "20 Mbit/s", "1 Gbit/s"):
        assert rate_text(rate_bytes_per_s(text)) == text
    for wrong in ("", "fast", "12 parsec", "-5d"):
        for read in (duration_s, size_bytes, rate_bytes_per_s):
            with pytest.raises(UsageError):
                read(wrong)


# --- what is shown


@pytest.mark.parametrize(
    ("measured", "limit", "shown"),
    [
        (None, None, "not measured yet, no limit"),
        (2.25e6, None, "18 Mbit/s measured, no limit"),
        (2.25e6, 2.5e6, "18 Mbit/s measured, limit 20 Mbit/s"),
    ],
)
def test_the_uplink_is_the_same_for_people_and_programs(
    measured: float | None, limit: float | None, shown: str
) -> None:
    answer = json.loads(json.dumps(_status(measured, limit).brief()))
    assert (answer["uplink_bytes_per_s"], answer["upload_limit_bytes_per_s"]) == (measured, limit)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(status_view([answer]))
    assert shown in console.export_text()


def test_what_keeps_a_peer_from_work_is_shown_with_what_to_do() -> None:
    text = told(1, "halt", Loss(height=12, log_tokens=1, certain=True, known=True))
    answer = json.loads(json.dumps(_status(None, None, text).brief()))
    assert answer["trouble"] == text
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(status_view([answer]))
    shown = console.export_text()
    assert "stage 1 is lost" in shown
    assert "shoal checkpoint gather PART..." in shown


def _status(
    uplink_bytes_per_s: float | None, upload_limit_bytes_per_s: float | None, trouble: str = ""
) -> Snapshot:
    own = Own(
        version="1",
        pid=1,
        run_name="run",
        run_id="00",
        peer="peer",
        name="ada",
        roles=("trainer",),
        state="observing",
        stage=None,
        stage_count=1,
        layers=None,
        device="cpu",
        memory_bytes=1,
        addresses=(),
        bootstrap=(),
        reachable="reachable",
        uplink_bytes_per_s=uplink_bytes_per_s,
        upload_limit_bytes_per_s=upload_limit_bytes_per_s,
        uptime_s=1.0,
        token_id="",
        token_until=NOW,
        leaf_until=NOW,
        revocation_version=0,
        data_dir="/",
        trouble=trouble,
        loop=LoopMeter().health(),
    )
    return Snapshot(at=NOW, me=own, stages=(Stage(stage=0, replicas=1),))


def test_copies_are_told_of_each_stage_that_a_peer_holds() -> None:
    def report(stage: int, heights: list[int], guards: list[int]) -> dict[str, Any]:
        return {
            "stage": stage,
            "height": 7,
            "outer": {"guardians": [{"height": height} for height in heights]},
            "guards": [{"stage": guarded, "behind": 1} for guarded in guards],
        }

    first, second = report(0, [7, 5], [2]), report(1, [], [])
    assert copies_text([first]) == "2 elsewhere (0, 2 rounds behind); guarding stage 2 (1 behind)"
    assert copies_text([first, second]) == (
        "stage 0: 2 elsewhere (0, 2 rounds behind); stage 1: none elsewhere; guarding stage 2 (1 behind)"
    )


def test_a_round_is_told_in_one_line_with_what_was_sent() -> None:
    fields = {"height": 7, "inner_step": 70, "loss": 3.25, "tokens_per_s": 1500.0}
    assert sentence("round", fields) == "round 7  step 70  loss 3.250  1,500 tok/s"
    told = sentence("round", {**fields, "bytes_out": 12_345_678})
    assert told == "round 7  step 70  loss 3.250  1,500 tok/s  sent 12.3 MB"


# --- control socket


async def _echo(request: Mapping[str, Any]) -> object:
    return request["text"]


async def _refuse(request: Mapping[str, Any]) -> object:
    raise StorageError("the disk is full\nfree some space")


async def _fail(request: Mapping[str, Any]) -> object:
    raise KeyError("of a bug")


async def _odd(request: Mapping[str, Any]) -> object:
    return {"no": object()}


def test_a_bug_in_an_action_is_not_taken_for_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "control.sock"
        async with serve_control(path, {"fail": _fail, "odd": _odd}):
            for action, kind in (("fail", "KeyError"), ("odd", "TypeError")):
                with pytest.raises(ShoalError, match=f"a bug in the daemon: {kind}") as refused:
                    await ask(path, action)
                assert not isinstance(refused.value, PeerUnreachable)
                assert refused.value.exit_code == ShoalError.exit_code

    asyncio.run(scenario())


def test_a_long_answer_is_not_written_on_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, threads = control._line, list[int]()

    def line(value: object) -> bytes:
        if "ok" in str(value):
            threads.append(threading.get_ident())
        return write(value)

    monkeypatch.setattr(control, "_line", line)

    async def scenario() -> None:
        path = tmp_path / "control.sock"
        async with serve_control(path, {"echo": _echo}):
            await ask(path, "echo", text="a megabyte")

    asyncio.run(scenario())
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("depth", [1, 12])
def test_the_control_socket_answers_also_from_a_deep_folder(tmp_path: Path, depth: int) -> None:
    folder = tmp_path.joinpath(*["a-rather-long-name"] * depth)
    folder.mkdir(parents=True)

    async def scenario() -> None:
        path = folder / "control.sock"
        async with serve_control(path, {"echo": _echo, "refuse": _refuse}):
            assert path.stat().st_mode & 0o077 == 0
            assert await ask(path, "echo", text="häh\n") == "häh\n"
            with pytest.raises(ShoalError, match="disk is full") as refused:
                await ask(path, "refuse")
            assert refused.value.exit_code == StorageError.exit_code
            with pytest.raises(ShoalError, match="knows echo, refuse"):
                await ask(path, "dance")
        with pytest.raises(PeerUnreachable):
            await ask(path, "echo", text="")

    asyncio.run(scenario())


def test_the_control_socket_survives_nonsense(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "control.sock"
        async with serve_control(path, {"echo": _echo}):
            for nonsense in (b"", b"\xff\xfe\n", b"[]\n", b'"echo"\n', b"x" * (1 << 20)):
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write(nonsense)
                writer.write_eof()
                with contextlib.suppress(ConnectionError):  # it hangs up on an endless line
                    await reader.read()
                writer.close()
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"[" * 60_000 + b"\n")
            assert b"knows echo" in await reader.read(), "what nests too deep is refused like the rest"
            writer.close()
            assert await ask(path, "echo", text="still here") == "still here"

    asyncio.run(scenario())


def test_of_many_idle_callers_of_the_control_socket_those_beyond_a_bound_are_hung_up_on(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        path = tmp_path / "control.sock"
        async with serve_control(path, {"echo": _echo}):
            idle = [await asyncio.open_unix_connection(str(path)) for _ in range(CONNECTIONS + WAITING)]
            reader, writer = await asyncio.open_unix_connection(str(path))
            assert await reader.read() == b""
            assert not any(waiting.at_eof() for waiting, _ in idle), "they still have their time"
            for _, other in (*idle, (reader, writer)):
                other.close()

    asyncio.run(scenario())


# --- the loop's own figures


def test_a_long_callback_is_named() -> None:
    meter = LoopMeter()

    async def busy() -> None:
        begin_s = time.thread_time()  # not before the loop is made: its first import takes a part of it
        while time.thread_time() - begin_s < 0.06:
            pass

    async def scenario() -> None:
        await asyncio.create_task(busy())

    with asyncio.Runner(loop_factory=lambda: new_loop(meter)) as runner:
        runner.run(scenario())
    health = meter.health()
    assert health.callbacks_over_limit == 1
    assert "busy (garbage 0 ms" in health.callback_worst
    assert health.callback_worst_ms >= 50


def test_a_long_callback_is_told_with_its_share_of_garbage() -> None:
    meter = LoopMeter()

    async def struck() -> None:
        kept = [[number] for number in range(1000)]
        begin_s = time.thread_time()
        while time.thread_time() - begin_s < 0.06:
            gc.collect()
        kept.clear()

    async def scenario() -> None:
        watching = asyncio.create_task(meter.watch_lag())
        await asyncio.sleep(0)  # it watches
        await asyncio.create_task(struck())
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: new_loop(meter)) as runner:
        runner.run(scenario())
    health = meter.health()
    told = re.search(r"struck \(garbage (\d+) ms, system \d+ ms\)", health.callback_worst)
    assert told is not None, health.culprits
    assert health.callback_worst_ms / 2 < int(told[1]) <= health.callback_worst_ms + 1
    assert not [each for each in gc.callbacks if "watch_lag" in getattr(each, "__qualname__", "")]


def test_a_callback_blocks_the_loop_if_it_was_over_the_limit_twice() -> None:
    """Once may be the machine: a CPU that the hypervisor stops is charged to whoever runs there."""
    meters = {"one": LoopMeter(), "other": LoopMeter()}

    def told() -> list[str]:
        loops = {peer: json.loads(json.dumps(asdict(meter.health()))) for peer, meter in meters.items()}
        return [re.sub(r" \(garbage.*", "", line) for line in repeated(loops)]

    meters["one"].ran(main, 0.177)
    meters["other"].ran(main, 0.02)
    meters["other"].ran(print, 0.06)
    assert told() == []
    meters["other"].ran(main, 0.09)
    assert told() == ["one: 177.0 ms CPU in main", "other: 90.0 ms CPU in main"]
    meters["other"].ran(print, 0.07)
    assert {line.split(":")[0] for line in told() if line.endswith("print")} == {"other"}


# --- sampling, and the demo's verdict


def test_heads_agree_only_at_heights_where_all_were_seen() -> None:
    heads = Heads()
    heads.add("a", 0, 1, "h1", "r1")
    heads.add("a", 0, 2, "h2", "r2")
    heads.add("b", 0, 1, "h1", "r1")
    assert heads.common_height(0, ["a", "b"]) == 1
    assert heads.group_height(0, but="b") == 2
    assert heads.differences() == []
    heads.add("b", 0, 2, "h2", "another root")
    assert len(heads.differences()) == 1


def _complete() -> Figures:
    return Figures(
        stages=2, kill=True, tokens=1, seconds=1.0, loss_first=5.0, loss_last=2.0, rounds=3,
        replicas=[2, 2], killed="peer-3", reroute_s=0.4, rejoin_s=9.0, heads_equal=True, text="x",
    )  # fmt: skip


@pytest.mark.parametrize(
    "missing",
    ["tokens", "loss_first", "loss_last", "rounds", "killed", "reroute_s", "rejoin_s", "heads_equal", "text"],
)
def test_a_demo_with_an_unmeasured_figure_has_failed(missing: str) -> None:
    figures = _complete()
    assert figures.failures() == []
    setattr(figures, missing, None)
    assert any(missing in failure for failure in figures.failures())


def test_a_demo_that_learned_nothing_or_disagrees_has_failed() -> None:
    for name, value in (("loss_last", 5.5), ("heads_equal", False), ("rounds", 0), ("replicas", [2, 0])):
        figures = _complete()
        setattr(figures, name, value)
        assert figures.failures(), name


def test_the_last_loss_is_the_one_of_the_most_tokens() -> None:
    losses = Losses()
    for loss, tokens in ((5.0, 100), (float("nan"), 150), (3.0, 300), (4.0, 200)):
        losses.add(loss, tokens)
    assert (losses.first, losses.last) == (5.0, 3.0)


def test_a_daemon_may_have_more_files_open_than_strangers_can_hold_for_long() -> None:
    """Each connection is one, and whoever connects has five seconds before it has to show who it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (OPEN_FILES, hard)
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (OPEN_FILES, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\tb\n[2J]52;c;cm0=é👩\u200d🔬"), (False, None)])
def test_a_text_that_servers_drew_moves_no_cursor_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, shown: str | None
) -> None:
    """What goes into a file or a pipe is the text as it is."""

    class Out(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    said = "a\tb\n\x1b[2J\x1b]52;c;cm0=\x07\r\x9b\x00é👩\u200d🔬"
    monkeypatch.setattr(sys, "stdout", out := Out())
    inference._show(said)
    assert out.getvalue() == (said if shown is None else shown)
