"""A peer's status as tables for people. Called by `shoal status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shoal.node.cli.units import rate_text


def status_view(statuses: Sequence[Mapping[str, Any]]) -> RenderableType:
    """All daemons of this machine, then the swarm as the first of them sees it."""
    return Group(*(_own(status) for status in statuses), _swarm(statuses[0]))


def _own(status: Mapping[str, Any]) -> RenderableType:
    training = status["training"]
    reports = (training, *status.get("others", ()))
    held = [status["stage"], *(other["stage"] for other in status.get("others", ()) if "stage" in other)]
    stage = f"stage{'s' if len(held) > 1 else ''} {', '.join(map(str, held))} of {status['stage_count']}"
    stage = "no stage" if status["stage"] is None else stage
    head = Text.assemble((status["name"], "bold"), f"  {status['state']}, {stage}, run {status['run_name']}")
    table = Table.grid(padding=(0, 2))
    if status["trouble"]:
        table.add_row(Text("trouble", "bold red"), escape(status["trouble"]))
    table.add_row("device", escape(status["device"] or "-"))
    table.add_row("address", escape(f"{', '.join(status['addresses'])}: {status['reachable']}"))
    table.add_row("uplink", _uplink(status["uplink_bytes_per_s"], status["upload_limit_bytes_per_s"]))
    if "inner_steps" in training:
        losses = (report.get("held_out_loss") or report.get("loss") for report in reports)
        loss = next(filter(None, losses), None)  # its driver's, where it has one
        table.add_row("training", training_text(training) + (f", loss {loss:.3f}" if loss else ""))
        table.add_row("micro-batches", micro_batches_text(training))
        table.add_row("copies", copies_text([report for report in reports if "guards" in report]))
    for report in reports:
        if "inner_steps" in report and report is not training:
            table.add_row(
                f"stage {report['stage']}", f"{training_text(report)}; {micro_batches_text(report)}"
            )
        if rebuilt := report.get("outer", {}).get("rebuilt"):
            table.add_row("log", rebuilt_text(rebuilt))
    for report in reports:
        if "sessions" in report:
            where = f" at stage {report['stage']}" if len(held) > 1 else ""
            table.add_row(f"serving{where}", sessions_text(report["sessions"]))
    loop = status["loop"]
    table.add_row("loop", f"lag p99 {loop['lag_p99_ms']:.1f} ms, longest callback "
                  f"{loop['callback_worst_ms']:.1f} ms CPU ({escape(loop['callback_worst'])})")  # fmt: skip
    return Group(head, table)


def training_text(training: Mapping[str, Any]) -> str:
    """How far a replica is."""
    return (
        f"round {training['height']}, {training['inner_steps']} steps, {training['tokens']:,} tokens, "
        f"{training['tokens_per_s']:,.0f} tok/s"
    )


def micro_batches_text(training: Mapping[str, Any]) -> str:
    """Promise P2 in figures: what counted, and whatever did not."""
    text = (
        f"{training['micro_batches']:,} applied, {training['duplicates_refused']} duplicates refused, "
        f"{training['dropped']} dropped undecided"
    )
    if "lost" in training:  # of a driver
        text += f", {training['lost']} lost at other stages"
    return text + (
        f"; {training['retries']} retries, {training['adopted']} adopted, {training['hedges']} hedges"
    )


def sessions_text(sessions: Mapping[str, Any]) -> str:
    """Inference at this peer, and the memory it may take."""
    charged, budget = sessions["charged_bytes"] >> 20, sessions["budget_bytes"] >> 20
    return (
        f"{sessions['sessions']} sessions in {charged:,} of {budget:,} MiB, {sessions['positions']:,} "
        f"positions, {sessions['refused']} refused, {sessions['evicted']} evicted"
    )


def copies_text(reports: Sequence[Mapping[str, Any]]) -> str:
    """Which guardians have each stage of this peer, and what it guards itself; how far behind copies are."""
    kept = []
    for report in reports:
        theirs = [str(report["height"] - guardian["height"]) for guardian in report["outer"]["guardians"]]
        text = f"{len(theirs)} elsewhere ({', '.join(theirs)} rounds behind)" if theirs else "none elsewhere"
        kept.append(f"stage {report['stage']}: {text}" if len(reports) > 1 else text)
    guarded = [copy for report in reports for copy in report["guards"]]
    mine = [f"stage {copy['stage']} ({copy['behind']} behind)" for copy in guarded]
    return f"{'; '.join(kept)}; guarding {', '.join(mine) or 'nothing'}"


def rebuilt_text(rebuilt: Mapping[str, Any]) -> str:
    """What the first entry of the stage's log says, where the stage was lost."""
    how = {"mean": "as the mean of its neighbours", "identity": "as layers that change nothing"}
    return (
        f"lost at round {rebuilt['lost_height']} with all its copies, rebuilt {how[rebuilt['policy']]}; "
        f"counts from {rebuilt['height']}"
    )


def _uplink(measured_bytes_per_s: float | None, limit_bytes_per_s: float | None) -> str:
    limit = "no limit" if limit_bytes_per_s is None else f"limit {rate_text(limit_bytes_per_s)}"
    if measured_bytes_per_s is None:
        return f"not measured yet, {limit}"
    return f"{rate_text(measured_bytes_per_s)} measured, {limit}"


def _heights(peer: Mapping[str, Any]) -> str:
    """Of each of its stages."""
    known = [held["height"] for held in peer.get("held", ())] or [peer["height"]]
    return ", ".join("-" if height is None else str(height) for height in known)


def _swarm(status: Mapping[str, Any]) -> RenderableType:
    table = Table("peer", "stage", "state", "tok/s", "rtt", "round", title=escape(status["verdict"]))
    for peer in status["peers"]:
        state = peer["state"] if peer["liveness"] == "alive" else f"{peer['liveness']}: {peer['reason']}"
        rtt = "-" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f} ms"
        table.add_row(
            escape(peer["name"]),
            ", ".join(map(str, peer["stages"])) or "-",
            escape(state),
            f"{peer['tokens_per_s']:,.0f}",
            rtt,
            _heights(peer),
        )
    return table
