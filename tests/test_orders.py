"""The owner's desk: checked at the border, one effect an order, all in the log, nothing without the key."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.node.cli.app import app
from shoal.node.events import Events
from shoal.node.obeying import errand_for, leave_when_told
from shoal.node.owner.actions import OwnerActions
from shoal.node.owner.audit import AuditEntry, AuditLog
from shoal.node.owner.desk import OrderDesk
from shoal.node.owner.home import OwnerHome
from shoal.node.owner.orders import KINDS, TokenOrder, parse_order, parse_token_order
from shoal.protocol import limits
from shoal.protocol.amendments import DRAIN, KICK, AmendmentBook
from shoal.protocol.errors import ShoalError, UsageError
from shoal.protocol.identity import PeerId, PeerKey
from shoal.training.spec import RunSpec

ANN, BOB = (PeerKey.generate().peer for _ in range(2))
HERE = {ANN: ("ann", 7), BOB: ("bob", 8)}


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def home(tmp_path: Path) -> OwnerHome:
    found = OwnerHome.of_run(tmp_path, RunSpec(), time.time())
    found.keep_addresses(("/ip4/127.0.0.1/tcp/9/p2p/" + ANN,))
    return found


def perform(home: OwnerHome, **request: object) -> AuditEntry:
    return OrderDesk(home, Clock()).perform(parse_order(request), HERE)


def token_order(**request: object) -> TokenOrder:
    return parse_token_order(request)


def test_the_same_order_twice_has_one_effect(home: OwnerHome) -> None:
    for request in (
        {"what": "pause"},
        {"what": "set", "values": {"inner.learning_rate": 0.001, "outer.inner_steps": 20}},
        {"what": "drain", "peer": "ann"},
        {"what": "kick", "peer": ANN},
        {"what": "ban", "peer": "bob"},
        {"what": "unban", "peer": BOB},
        {"what": "resume"},
        {"what": "stop"},
    ):
        first, again = perform(home, **request), perform(home, **request)
        assert (first.changed, again.changed) == (True, False)
        assert again.version == first.version
        assert again.text.startswith("nothing to do")
    listed = home.key.amendments()
    assert [(e.kind, e.peer, e.incarnation) for e in listed.errands] == [(DRAIN, ANN, 7), (KICK, ANN, 7)]
    assert [(s.key, s.value) for s in listed.settings] == [
        ("inner.learning_rate", 0.001),
        ("outer.inner_steps", 20.0),
    ]
    assert len({s.revision for s in listed.settings}) == 1, "one order, one revision"


def test_an_order_under_one_key_is_performed_once_whatever_happened_since(home: OwnerHome) -> None:
    first = perform(home, what="pause", key="click-1")
    perform(home, what="resume")
    assert perform(home, what="pause", key="click-1") == first
    assert home.key.amendments().state == "running"


def test_what_cannot_be_is_refused_at_the_border_or_by_the_spec(home: OwnerHome) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "is no order"),
        ({"what": ["pause"]}, "is no order"),
        ({"what": "format"}, "there are: pause"),
        ({"what": "pause", "who": "x" * 65}, "at most 64 printable"),
        ({"what": "pause", "who": 5}, "has to be text"),
        ({"what": "pause", "key": "a\nb"}, "printable"),
        ({"what": "kick"}, "needs a peer"),
        ({"what": "kick", "peer": "nobody"}, "no peer 'nobody' is here"),
        ({"what": "kick", "peer": "ann", "reason": "r" * 201}, "at most 200"),
        ({"what": "ban", "peer": "12D3KooWnonsense"}, "no peer"),
        ({"what": "set"}, "set needs values"),
        ({"what": "set", "values": {}}, "set needs values"),
        ({"what": "set", "values": {"inner.learning_rate": "fast"}}, "needs a number"),
        ({"what": "set", "values": {"inner.learning_rate": True}}, "needs a number"),
        ({"what": "set", "values": {"model.width": 64}}, "cannot be changed in a run"),
        ({"what": "set", "values": {"inner.learning_rate": -1.0}}, "inner.learning_rate = -1 is refused"),
        ({"what": "set", "values": {"inner.learning_rate": float("nan")}}, "is refused"),
        ({"what": "set", "values": {"outer.inner_steps": 2.5}}, "is refused"),
        ({"what": "set", "values": {"outer.inner_steps": 10**400}}, "smaller number"),
        ({"what": "checkpoint"}, "gathered by a running peer"),
    ]
    for request, words in cases:
        with pytest.raises(UsageError, match=words):
            perform(home, **request)
    assert home.key.amendments().version == 0
    log = AuditLog(home.folder).entries()
    assert log
    assert all(entry.refused and not entry.changed for entry in log), "refused orders are in the log, too"


def test_many_changes_of_one_setting_leave_a_list_that_fits(home: OwnerHome) -> None:
    perform(home, what="set", values={"outer.inner_steps": 3})
    for number in range(limits.AMENDED_SETTINGS + 5):
        perform(home, what="set", values={"inner.learning_rate": 0.001 * (number + 1)})
    settings = home.key.amendments().settings
    assert len(settings) == limits.AMENDED_SETTINGS
    assert settings[0].key == "outer.inner_steps", "in force still"
    for number in range(limits.ERRANDS + 3):
        OrderDesk(home).perform(parse_order({"what": "kick", "peer": "ann"}), {ANN: ("ann", number)})
    assert len(home.key.amendments().errands) == limits.ERRANDS


def test_the_log_is_private_bounded_and_survives_a_torn_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, most_bytes=2000)
    for number in range(40):
        log.append(AuditEntry(number=0, at_unix_s=1.0, who="page:1", what="pause", text=str(number)))
    found = log.entries()
    assert [entry.number for entry in found] == list(range(41 - len(found), 41))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all(path.stat().st_size <= 2000 for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    with (tmp_path / "orders.jsonl").open("a") as file:
        file.write('{"number": 99, "who"')
    assert log.append(AuditEntry(number=0, at_unix_s=1.0, who="cli", what="resume")).number == 41
    assert log.entries()[-1].what == "resume"


def test_tokens_are_made_and_revoked_and_the_log_never_has_their_text(home: OwnerHome) -> None:
    desk = OrderDesk(home, time.time)
    made = desk.create_token(token_order(name="ann", ttl_s=3600, who="page:1", key="k"))
    assert made["command"] == f"shoal join {made['token']}"
    with pytest.raises(UsageError, match="done already"):
        desk.create_token(token_order(name="ann", key="k"))
    assert [(t["id"], t["state"]) for t in desk.tokens()] == [(made["id"], "good")]
    assert desk.revoke_token(made["id"], "page:1").changed
    assert not desk.revoke_token(made["id"], "page:1").changed
    assert desk.tokens()[0]["state"] == "revoked"
    kept = (home.folder / "orders.jsonl").read_text()
    assert str(made["token"]) not in kept
    assert [json.loads(line)["what"] for line in kept.split("\n") if line] == [
        "token_create",
        "token_revoke",
        "token_revoke",
    ]
    for request, words in (
        ({"roles": ["owner"]}, "grants one or more"),
        ({"roles": ["king"]}, "grants one or more"),
        ({"roles": [["trainer"]]}, "grants one or more"),
        ({"roles": "trainer"}, "grants one or more"),
        ({"ttl_s": float("nan")}, "a token lives"),
        ({"ttl_s": 1e12}, "a token lives"),
        ({"ttl_s": "long"}, "number of seconds"),
        ({"name": "x" * 33}, "at most 32"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_token_order(request)
    with pytest.raises(UsageError, match="issued no token"):
        desk.revoke_token("00", "page:1")


def test_a_peer_without_the_owners_key_says_where_to_go() -> None:
    def silent(kind: str, fields: Mapping[str, object]) -> None:
        raise AssertionError("nothing is to be told")

    events: Events = silent
    actions = OwnerActions(None, lambda: None, lambda: None, events).actions()
    assert set(actions) == {"order", "orders", "tokens", "token_create", "token_revoke"}
    request: dict[str, Any] = {"what": KINDS[0]}
    for action in actions.values():
        with pytest.raises(UsageError, match="run it on the machine of `shoal up`"):
            asyncio.run(_asked(action, request))


async def _asked(action: Any, request: dict[str, Any]) -> object:
    return await action(request)


def test_an_old_errand_is_not_for_a_process_that_came_back(home: OwnerHome) -> None:
    perform(home, what="drain", peer="ann")
    perform(home, what="kick", peer="ann")
    listed = home.key.amendments()
    found = errand_for(listed, ANN, 7)
    assert found is not None
    assert found.kind == KICK
    assert errand_for(listed, ANN, 3) == found, "it moved to another stage meanwhile"
    assert errand_for(listed, ANN, 8) is None
    assert errand_for(listed, BOB, 7) is None
    assert errand_for(listed, PeerId(""), 0) is None


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (
            {"what": "drain", "peer": "ann", "reason": "an update"},
            ("the run's owner asked for it: an update", False),
        ),
        ({"what": "kick", "peer": "ann"}, ("the run's owner asked for it", True)),
        ({"what": "stop"}, ("the run's owner has stopped the run", False)),
    ],
)
def test_a_peer_leaves_when_it_is_told_and_the_owners_own_outlives_the_run(
    home: OwnerHome, request_: dict[str, object], told: tuple[str, bool]
) -> None:
    async def main() -> None:
        key, heard = home.key, list[tuple[str, bool]]()
        book = AmendmentBook(key.run_id, key.root_der, key.amendments_path)
        gone = asyncio.Event()

        def leave(reason: str, at_once: bool) -> None:
            heard.append((reason, at_once))
            gone.set()

        waiting = asyncio.create_task(leave_when_told(book, ANN, 7, leave, stays=False))
        others = [
            asyncio.create_task(leave_when_told(book, BOB, 8, leave, stays=True)),
            asyncio.create_task(leave_when_told(book, ANN, 9, leave, stays=True)),
        ]
        await asyncio.sleep(0)
        perform(home, what="pause")
        perform(home, **request_)
        assert book.reload()
        await gone.wait()
        await asyncio.sleep(0)
        assert heard == [told]
        for task in (waiting, *others):
            task.cancel()

    asyncio.run(main())


def shoal(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command here; its exit code and what it printed."""
    result = CliRunner().invoke(app, [*arguments, "--data-dir", str(folder)])
    error = result.exception
    if isinstance(error, ShoalError):  # `main` makes the message and the code of it
        return error.exit_code, result.stdout, str(error)
    assert error is None or isinstance(error, SystemExit), error
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line_orders_on_the_owners_folder_where_no_daemon_runs(
    tmp_path: Path, home: OwnerHome
) -> None:
    code, said, why = shoal(tmp_path, "run", "pause")
    assert (code, said) == (2, "")
    assert "nobody can be asked" in why
    assert "--yes" in why
    assert home.key.amendments().version == 0

    code, said, _ = shoal(tmp_path, "run", "pause", "--yes", "--json")
    assert code == 0
    entry = json.loads(said)
    assert (entry["who"], entry["what"], entry["changed"], entry["spread"]) == (
        "command line",
        "pause",
        True,
        False,
    )
    code, said, why = shoal(tmp_path, "run", "set", "inner.learning_rate=1e-4", "--yes")
    assert (code, said) == (0, "")
    assert "inner.learning_rate = 0.0001 from the next round on" in why
    assert "peers hear of it when `shoal up` runs again" in why
    found = json.loads(shoal(tmp_path, "run", "status", "--json")[1])
    assert (found["state"], found["version"], found["owner_runs"]) == ("paused", 2, False)
    assert found["values"]["inner.learning_rate"] == 1e-4
    assert [order["what"] for order in found["orders"]] == ["set", "pause"]
    for arguments, words in (
        (("run", "set", "inner.learning_rate", "--yes"), "is not KEY=VALUE"),
        (("run", "set", "model.width=8", "--yes"), "cannot be changed in a run"),
        (("peer", "kick", "ann", "--yes"), "kick needs the owner's peer to run"),
        (("peer", "ban", "ann", "--yes"), "or the peer's whole id"),
    ):
        code, _, why = shoal(tmp_path, *arguments)
        assert code == 2
        assert words in why
    assert shoal(tmp_path, "peer", "ban", ANN, "--reason", "lies", "--yes")[0] == 0
    assert ANN in home.key.revocations().peers
    assert shoal(tmp_path, "peer", "unban", ANN, "--yes")[0] == 0
    assert ANN not in home.key.revocations().peers
    code, _, why = shoal(tmp_path / "elsewhere", "run", "pause", "--yes")
    assert code == 2
    assert "no run was started from" in why


@pytest.mark.parametrize("action", ["order", "token_revoke"])
def test_what_was_signed_is_spread_though_whoever_asked_is_cut_off(
    home: OwnerHome, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, spread = threading.Event(), threading.Event(), list[str]()
    token = str(OrderDesk(home, Clock()).create_token(token_order(name="ann"))["id"])
    note = OrderDesk._note

    def slow(desk: OrderDesk, *arguments: Any, **more: Any) -> AuditEntry:
        begun.set()
        go_on.wait(10.0)
        return note(desk, *arguments, **more)

    monkeypatch.setattr(OrderDesk, "_note", slow)
    lists = SimpleNamespace(reload=lambda: spread.append("read anew"))
    presence: Any = SimpleNamespace(
        transport=SimpleNamespace(me="me"),
        name="me",
        members=SimpleNamespace(view=lambda: SimpleNamespace(here=list, me="me")),
        membership=SimpleNamespace(amendments=lists, revocations=lists),
    )

    async def main() -> None:
        actions = OwnerActions(
            home, lambda: presence, lambda: None, lambda kind, fields: spread.append(kind)
        ).actions()
        asking = asyncio.create_task(_asked(actions[action], {"what": "pause", "id": token}))
        await asyncio.to_thread(begun.wait, 10.0)
        asking.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(asking, return_exceptions=True)
        assert asking.cancelled()
        assert spread == ["read anew", "order"]

    asyncio.run(main())
