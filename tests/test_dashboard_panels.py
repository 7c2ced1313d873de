"""What the page draws, without a browser: all panels of all snapshots, and nothing that breaks out of it."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import io
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
from dashboard_world import full_snapshot
from view_world import NOW, own

from shoal.node.dashboard.charts import nice_ticks, thinned
from shoal.node.dashboard.markup import Markup, tag, text
from shoal.node.dashboard.page import PANELS
from shoal.node.dashboard.panels.events import events, orders
from shoal.node.dashboard.panels.overview import stale_banner, tiles, top_bar, verdict_level
from shoal.node.dashboard.panels.peers import as_csv, chosen
from shoal.node.dashboard.panels.pipeline import pipeline
from shoal.node.dashboard.panels.questions import question_of
from shoal.node.dashboard.panels.scrubber import WINDOWS, reach, scrubber
from shoal.node.dashboard.past import Looking
from shoal.node.dashboard.state import Invitation, PageState, Past, Tryout
from shoal.node.view.snapshot import Snapshot
from shoal.node.view.verdict import verdict

EVERYTHING = frozenset(
    ("snapshot", "order", "orders", "tokens", "token_create", "token_revoke", "generate_start")
)
KINDS = ["pause", "resume", "stop", "checkpoint", "set", "drain", "kick", "ban", "unban"]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>`${7*7}`</textarea></dialog>\x00\u202e"
BUSY = PageState(
    now=NOW,
    actions=EVERYTHING,
    tokens=({"id": "aa", "name": "bob", "roles": ["trainer"], "state": "good", "not_after": NOW},),
    orders={
        "state": "paused",
        "orders": [{"number": 1, "at_unix_s": NOW, "what": "pause", "text": "paused"}],
    },
    trouble="gone",
    rates=((NOW - 600, 10.0), (NOW, 20.0)),
    span=(NOW - 7 * 86400.0, NOW),
    contributors=({"peer": "p", "name": "bob", "tokens": 5, "uptime_s": 1.0, "last_at": NOW},),
    peer="12D3Koo0002",
    rates_open=True,
    refusal="no",
    told="done",
    invitation=Invitation("aa", "bob", "shoal join TOKEN", NOW),
    tryout=Tryout("def ", "add", False, "3 tokens"),
)


class Elements(HTMLParser):
    """All tags and attribute names of a text, and its visible words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {str(value) for name, value in attrs if name in ("href", "src", "action")}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def drawn(snapshot: Snapshot, state: PageState) -> str:
    frame = (top_bar(snapshot, state), stale_banner(snapshot, state))
    return "".join((*frame, *(draw(snapshot, state) for _, _, draw in PANELS)))


def hostile(value: Any) -> Any:
    """The same with every text, keys of mappings too, replaced by an attack; ids of peers stay."""
    if isinstance(value, str):
        return HOSTILE
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: hostile(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple | list):
        return type(value)(hostile(one) for one in value)
    if isinstance(value, Mapping):
        return {hostile(key): hostile(one) for key, one in value.items()}
    return value


@pytest.mark.parametrize("state", [PageState(now=NOW), BUSY], ids=["fresh", "busy"])
def test_every_panel_draws_a_run_of_which_nothing_is_known_yet(state: PageState) -> None:
    assert drawn(Snapshot(at=NOW, me=own()), state)


def test_no_text_of_a_peer_becomes_an_element_or_an_attribute() -> None:
    honest = full_snapshot()
    told = (PageState(now=NOW, actions=EVERYTHING), BUSY)
    usual = Elements("".join(drawn(honest, state) for state in told))
    attack = hostile(honest)
    state = dataclasses.replace(hostile(BUSY), actions=EVERYTHING)
    asked = question_of({"what": "ban", "peer": HOSTILE}, attack)
    found = Elements(drawn(attack, state) + drawn(attack, dataclasses.replace(state, question=asked)))
    assert "script" not in found.tags
    assert found.tags - usual.tags <= {"dialog", "input", "label", "form", "p"}  # of the question
    assert not [name for name in found.attributes if name.startswith("on")]
    assert all(link.startswith(("#", "data:image/svg+xml", "/logout")) for link in found.links)
    assert any("<script>alert(1)" in words for words in found.words), "the attack itself is shown, as text"


def test_text_is_cut_and_loses_what_does_not_print() -> None:
    assert text("a" * 1000, 10) == "aaaaaaaaa…"
    assert text("a\x00b\u202ec\x1b") == "abc"
    assert tag("p", "<b>", tag("b", "x"), title='"') == '<p title="&quot;">&lt;b&gt;<b>x</b></p>'
    assert tag("p", Markup("<i>"), hidden=True, lang=None) == "<p hidden><i></p>"


def test_the_weakest_stage_is_outlined_and_cells_fill_with_the_rate() -> None:
    snapshot = full_snapshot()
    html = pipeline(snapshot, PageState())
    assert html.count('class="stage weakest"') == 1
    fast, slow = max(snapshot.peers, key=lambda p: p.tokens_per_s), snapshot.peers[4]
    sizes = {
        peer.peer: float(html.split(f'data-key="{peer.peer}"')[0].rsplit("--share:", 1)[1].split("%")[0])
        for peer in (fast, slow)
    }
    assert sizes[fast.peer] > sizes[slow.peer]


def test_the_lamp_follows_the_verdict() -> None:
    def lamp(replicas: tuple[int, ...], standing: str = "running", trains: bool = True) -> str:
        found = verdict(replicas, standing, trains=trains)
        return verdict_level(dataclasses.replace(full_snapshot(), verdict=found))

    assert verdict_level(full_snapshot()) == "warn", "it has findings"
    assert lamp((2, 3)) == lamp((2, 3), trains=False) == "ok"
    assert lamp((2, 1)) == "warn"
    assert lamp((2, 0)) == lamp((2, 0), "paused") == "bad"
    assert lamp((2, 3), "paused") == lamp((2, 0), "stopped") == lamp(()) == "idle"


def test_the_table_filters_by_words_and_sorts_by_any_column_unknown_last() -> None:
    snapshot = full_snapshot()
    found = chosen(snapshot, PageState(filter="stage 3 online"))
    assert found and all(peer.stages == (3,) for peer in found)
    rated = [p.tokens_per_s for p in chosen(snapshot, PageState(sort="rate", descending=True))]
    assert rated == sorted(rated, reverse=True)
    busy = [p.busy_share for p in chosen(snapshot, PageState(sort="busy"))]
    assert busy[-1] is None and busy[:-1] == sorted(share for share in busy if share is not None)


def test_csv_has_a_row_for_each_peer_and_no_formulas() -> None:
    snapshot = full_snapshot()
    evil = dataclasses.replace(
        snapshot,
        peers=(*snapshot.peers, dataclasses.replace(snapshot.peers[0], peer="x", name="=HYPERLINK(1)")),
    )
    rows = list(csv.reader(io.StringIO(as_csv(evil, PageState()))))
    assert len(rows) == 1 + len(evil.peers)
    assert not [cell for row in rows[1:] for cell in row if cell.startswith(("=", "@", "+"))]


def test_what_the_daemon_cannot_do_has_no_button() -> None:
    snapshot = full_snapshot()
    opened = PageState(now=NOW, peer=snapshot.peers[1].peer)
    html = drawn(snapshot, opened)
    for word in ("Pause", "Kick", "Create token", "Checkpoint now", "Try it</h2>"):
        assert word not in html
    html = drawn(snapshot, dataclasses.replace(opened, actions=EVERYTHING, orders={"kinds": KINDS}))
    for word in ("Pause", "Kick", "Create token", "Checkpoint now", "Try it</h2>"):
        assert word in html


def test_a_question_is_made_for_peers_that_are_there_and_names_what_follows() -> None:
    snapshot = full_snapshot()
    asked = question_of({"what": "ban", "peer": snapshot.peers[1].peer}, snapshot)
    assert asked is not None and asked.asks_reason and snapshot.peers[1].if_leaves in asked.words
    assert asked.arguments == {"what": "ban", "peer": snapshot.peers[1].peer}
    shut = question_of({"what": "token_revoke", "token": "ab12"}, snapshot)
    assert shut is not None and (shut.do, shut.arguments) == ("token_revoke", {"id": "ab12"})
    assert question_of({"what": "ban", "peer": "nobody"}, snapshot) is None
    back = question_of({"what": "unban", "peer": "somebody gone"}, snapshot)
    assert back is not None and back.arguments == {"what": "unban", "peer": "somebody gone"}
    assert question_of({"what": "format-disk"}, snapshot) is None


def test_many_replicas_are_drawn_small_and_only_the_first_peers_in_the_table() -> None:
    snapshot = full_snapshot(stages=8, replicas=25)
    html = pipeline(snapshot, PageState())
    assert "compact" in html
    assert html.count("data-flip") == len(snapshot.peers)
    assert drawn(snapshot, PageState()).count("<tr") < 150


def test_events_name_peers_by_name_and_an_order_can_be_taken_back() -> None:
    snapshot = full_snapshot()
    id_ = "12D3KooW" + "a" * 44
    peer = dataclasses.replace(snapshot.peers[1], peer=id_, name="heron")
    row = dataclasses.replace(snapshot.events[0], text=f"the stream to {id_} broke")
    found = events(dataclasses.replace(snapshot, peers=(peer,), events=(row,)), PageState())
    assert "the stream to heron broke" in found and id_ not in found
    ban: dict[str, object] = {
        "number": 2,
        "what": "ban",
        "arguments": {"peer": id_},
        "text": "it is shut out",
    }
    told = orders(snapshot, PageState(actions=EVERYTHING, orders={"kinds": KINDS, "orders": [ban]}))
    assert "Unban" in told
    kinds = [kind for kind in KINDS if kind != "unban"]
    assert "Unban" not in orders(
        snapshot, PageState(actions=EVERYTHING, orders={"kinds": kinds, "orders": [ban]})
    )


def test_ticks_are_round_and_cover_the_figures() -> None:
    assert nice_ticks(0.0, 9.0, 4) == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert nice_ticks(3.0, 3.0, 4)[0] < 3.0 < nice_ticks(3.0, 3.0, 4)[-1]
    assert thinned([(float(i), 0.0) for i in range(1001)], 100)[-1] == (1000.0, 0.0)
    assert "None" not in tiles(Snapshot(at=NOW, me=own()), PageState())


@pytest.mark.parametrize("window_s", [seconds for seconds, _ in WINDOWS])
def test_the_sliders_last_step_is_now_however_far_it_reaches(window_s: float) -> None:
    then = dataclasses.replace(full_snapshot(), at=NOW - 3000.0)
    past = Past(snapshot=then, before=None, after=None, window_s=window_s, until=NOW)
    state = dataclasses.replace(BUSY, now=NOW + 60.0, window_s=window_s, past=past)
    left, until, step = reach(state)
    assert left >= NOW - 7 * 86400.0 and until == NOW
    last = left + (until - left) // step * step  # as far as a browser lets it go
    became: list[PageState] = []
    feed: Any = None  # nothing is asked
    looking = Looking(feed, lambda: state, became.append)
    asyncio.run(looking.at({"value": str(last)}))
    assert [one.past for one in became] == [None]


def test_the_past_says_when_it_was_and_takes_no_orders() -> None:
    then = dataclasses.replace(full_snapshot(), at=NOW - 3000.0)
    past = Past(snapshot=then, before=None, after=NOW - 2990.0, window_s=3600.0, until=NOW)
    state = dataclasses.replace(BUSY, past=past)
    assert not any(state.can(action) for action in EVERYTHING)
    html = scrubber(full_snapshot(), state)
    assert "not live" in html and "50 min ago" in html
    assert "not live" not in scrubber(full_snapshot(), BUSY)
    assert scrubber(full_snapshot(), dataclasses.replace(BUSY, span=None)) == ""
