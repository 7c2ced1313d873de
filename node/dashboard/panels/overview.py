"""The top of the page: who this is, how the run is in one sentence, what can be done, six figures."""

from __future__ import annotations

from itertools import pairwise

from shoal.node.dashboard import words
from shoal.node.dashboard.charts import bar, spark
from shoal.node.dashboard.markup import Markup, join, tag
from shoal.node.dashboard.panels.card import button
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot

_SECTIONS = (
    ("Loss", "loss"),
    ("Pipeline", "pipeline"),
    ("Peers", "peers"),
    ("Rounds", "rounds"),
    ("Network", "links"),
    ("Invite", "invitations"),
    ("Try it", "tryout"),
    ("Events", "events"),
)
_SPARK_POINTS = 60


def top_bar(snapshot: Snapshot | None, state: PageState) -> Markup:
    """Name, sections, theme, signing out."""
    name = snapshot.run.name if snapshot else ""
    links = (tag("a", title, href=f"#{place}") for title, place in _SECTIONS)
    return join(
        [
            tag("a", "Skip to the content", href="#verdict", class_="skip"),
            tag("span", Markup(_FISH), "Shoal", class_="brand"),
            tag("span", name, class_="run-name") if name else None,
            tag("nav", *links, aria_label="Sections"),
            tag(
                "button",
                Markup("&#9680;"),
                type="button",
                class_="icon",
                data_theme_switch=True,
                aria_label="Switch between light and dark",
                title="Light or dark",
            ),
            tag("form", tag("button", "Sign out", class_="button quiet"), method="post", action="/logout"),
        ]
    )


def stale_banner(snapshot: Snapshot | None, state: PageState) -> Markup:
    """Shown when the daemon does not answer; what the browser itself notices is in `theme.js`."""
    if not state.trouble:
        return Markup()
    since = f" Everything below is as of {words.clock(snapshot.at)}." if snapshot else ""
    why = tag("small", f" ({state.trouble})")
    return tag("p", tag("b", "The daemon does not answer."), f"{since} Training goes on.", why, role="alert")


def verdict(snapshot: Snapshot, state: PageState) -> Markup:
    """One sentence, what stands against it, and the buttons."""
    level = verdict_level(snapshot)
    findings = [
        tag("li", finding.text, data_key=f"{finding.kind}{finding.peer}{finding.stage}")
        for finding in snapshot.verdict.findings[:6]
    ]
    return join(
        [
            tag(
                "div",
                tag("i", class_=f"lamp {level}", aria_hidden="true"),
                tag("h1", snapshot.verdict.text),
                class_="sentence",
                role="status",
            ),
            tag("ul", *findings, class_="findings") if findings else None,
            tag("p", snapshot.me.trouble, class_="trouble") if snapshot.me.trouble else None,
            _orders(snapshot, state),
        ]
    )


def verdict_level(snapshot: Snapshot) -> str:
    """ok, warn, bad or idle: the colour of the lamp."""
    found = snapshot.verdict
    if found.state in ("paused", "stopped", "starting") and found.level != "bad":
        return "idle"
    return "warn" if found.level == "ok" and found.findings else found.level


def _orders(snapshot: Snapshot, state: PageState) -> Markup | None:
    running = state.orders.get("state", "running") == "running"
    buttons = (
        ("Pause", "ask", "", "pause", running),
        ("Resume training", "ask", "go", "resume", not running),
        ("Checkpoint now", "ask", "", "checkpoint", True),
        ("Learning rate and H…", "rates", "", "set", True),
        ("Stop the run", "ask", "quiet", "stop", running),
    )
    shown = [
        button(words, do, kind, what=what)
        for words, do, kind, what, fits in buttons
        if fits and state.can("order", what)
    ]
    return tag("div", *shown, class_="buttons") if shown else None


def tiles(snapshot: Snapshot, state: PageState) -> Markup:
    """Six figures that say how far and how fast."""
    run, throughput = snapshot.run, snapshot.throughput
    held_out = next((p.held_out for p in reversed(snapshot.loss) if p.held_out is not None), None)
    train = next((p.train for p in reversed(snapshot.loss) if p.train is not None), None)
    done = run.tokens / run.goal_tokens if run.goal_tokens else None
    losses = [point.train for point in snapshot.loss if point.train is not None][-_SPARK_POINTS:]
    goal = f"of {words.number(run.goal_tokens)}" if run.goal_tokens else ""
    eta = f", {words.duration(run.eta_s)} to go" if run.eta_s else ""
    saved = snapshot.checkpoints
    return join(
        [
            _tile(
                "Held-out loss" if held_out is not None else "Loss",
                words.loss(held_out if held_out is not None else train),
                f"training {words.loss(train)}" if held_out is not None else "nats a token",
                spark(losses, "Loss of late", min(losses)) if losses else None,
            ),
            _tile(
                "Tokens a second",
                words.number(throughput.now),
                f"best {words.number(max(throughput.best, throughput.now))}" if throughput.best else "now",
                spark(rates(snapshot), "Tokens a second of late"),
            ),
            _tile(
                "Tokens",
                words.number(run.tokens),
                f"{goal}{eta}" or "committed",
                bar(done, label=f"{done:.0%} done") if done is not None else None,
            ),
            _tile(
                "Round",
                words.number(run.height),
                f"{run.inner_steps} inner steps each" if run.inner_steps else "",
            ),
            _tile(
                "Peers online",
                words.number(snapshot.online),
                f"weakest stage: {words.count(min(snapshot.replicas), 'replica')}"
                if snapshot.replicas
                else "",
            ),
            _tile(
                "Last checkpoint",
                words.duration(saved.age_s) + " ago" if saved.age_s is not None else "none yet",
                saved.refused or (words.size(saved.bytes) if saved.bytes else ""),
            ),
        ]
    )


def rates(snapshot: Snapshot) -> list[float]:
    """Tokens a second between the points of the loss curve, the newest last."""
    points = snapshot.loss[-_SPARK_POINTS:]
    pairs = pairwise(points)
    return [(b.tokens - a.tokens) / (b.at - a.at) for a, b in pairs if b.at > a.at and b.tokens >= a.tokens]


def _tile(title: str, value: str, detail: str, drawing: Markup | None = None) -> Markup:
    return tag(
        "div",
        tag("h2", title),
        tag("p", value, class_="value"),
        tag("p", detail, class_="detail"),
        drawing,
        class_="tile",
        data_key=title,
    )


_FISH = (
    '<svg viewBox="0 0 32 32" aria-hidden="true"><path d="M5 11q6-5 13 0l5-3v6l-5-3q-7 5-13 0z'
    'm4 11q6-5 13 0l5-3v6l-5-3q-7 5-13 0z"/></svg>'
)
