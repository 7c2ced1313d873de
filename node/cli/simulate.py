"""`shoal simulate`: what a run would make of a swarm of so many peers that come and go, in virtual time."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.units import duration_s
from shoal.protocol.errors import UsageError

if TYPE_CHECKING:
    from shoal.node.simulate.outcome import Outcome
    from shoal.training.spec import RunSpec


class Routing(StrEnum):
    """Whose rules route and rebalance."""

    SHOAL = "shoal"
    SWARM = "swarm"
    RANDOM = "random"


class Recovery(StrEnum):
    """What becomes of the work behind a hop that died."""

    REDO = "redo"
    ADOPT = "adopt"


def simulate(
    path: Annotated[Path, typer.Argument(metavar="RUN.TOML")],
    peers: Annotated[int, typer.Option(min=1, max=100_000, help="Peers at any time.")] = 20,
    hours: Annotated[float, typer.Option(min=0.001, help="Virtual time that is measured.")] = 0.1,
    session: Annotated[str, typer.Option(help="How long a peer stays on average.")] = "30m",
    seed: Annotated[int, typer.Option(min=0, help="Draws machines, links and everything else.")] = 1,
    speed_spread: Annotated[float, typer.Option(min=1, help="Fastest peer to slowest.")] = 8.0,
    micro_batch: Annotated[str, typer.Option(help="Mean lane time of a micro-batch at a stage.")] = "2s",
    warmup: Annotated[str, typer.Option(help="Before measuring. Default: until the pipeline is full.")] = "",
    killed: Annotated[float, typer.Option(min=0, max=1, help="Share of peers that go without a word.")] = 0.5,
    routing: Annotated[Routing, typer.Option(help="Baselines need --policies-only.")] = Routing.SHOAL,
    recovery: Annotated[
        Recovery,
        typer.Option(help="What is behind a dead hop: adopted by its heir, or redone (--policies-only)."),
    ] = Recovery.ADOPT,
    stages: Annotated[
        int, typer.Option(min=1, help="Stages that a peer may hold at once, as in shoal join (--full).")
    ] = 1,
    policies_only: Annotated[
        bool | None,
        typer.Option(
            "--policies-only/--full",
            help="Policies without messages, or the whole protocol. Default: by the number of peers.",
        ),
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead, decide again what peers of this run wrote with --decisions.", show_default=False
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one line of JSON.")] = False,
) -> None:
    """Simulate a swarm in virtual time. The same seed gives the same trace."""
    from shoal.node.cli.progress import progress_bar
    from shoal.node.simulate.options import FULL_PROTOCOL_PEERS, Options, filled_s
    from shoal.node.simulate.report import write_report
    from shoal.node.simulate.run import simulate_run
    from shoal.training import spec_file

    spec = spec_file.load(path)
    if replay:
        _replay(spec, replay, as_json)
        return
    micro_batch_s = duration_s(micro_batch)
    chain_s = filled_s(spec.stages.count, micro_batch_s)
    options = Options(
        peers=peers,
        duration_s=hours * 3600,
        warmup_s=duration_s(warmup) if warmup else chain_s,
        seed=seed,
        session_s=duration_s(session),
        micro_batch_s=micro_batch_s,
        speed_spread=speed_spread,
        kill_share=killed,
        policies_only=policies_only,
        router=routing.value,
        recovery=recovery.value,
        stages_most=stages,
    )
    if policies_only is False and (routing is not Routing.SHOAL or recovery is not Recovery.ADOPT):
        raise UsageError("--routing and --recovery choose what is simulated with --policies-only, not --full")
    if stages > 1 and options.mode != "full":
        raise UsageError(
            "--stages is for the whole protocol, and policies alone would be simulated\n"
            f"use --full, best with at most {FULL_PROTOCOL_PEERS} peers"
        )
    if chain_s > spec.limits.hop_timeout_s:
        note(
            f"a micro-batch may take {chain_s:.0f} s through {spec.stages.count} stages, and "
            f"limits.hop_timeout_s = {spec.limits.hop_timeout_s:g} sends it another way before"
        )
    note(options.told())
    with progress_bar("simulating", of_bytes=False) as progress:
        outcome = simulate_run(spec, options, progress)
    if report is not None:
        write_report(outcome, spec.run.name, report)
        note(f"wrote {report}")
    if as_json:
        print_json(outcome.to_json())
    else:
        out.print(_text(outcome), soft_wrap=True)


def _replay(spec: RunSpec, paths: list[Path], as_json: bool) -> None:
    """Exit code 1 if a decision differs."""
    from shoal.node.simulate.replay import replay

    found = replay(spec, paths)
    if as_json:
        print_json({"decisions": dict(sorted(found.decisions.items())), "differences": found.differences})
    else:
        out.print("\n".join((*found.differences, found.told())), soft_wrap=True, markup=False)
    if found.differences:
        raise typer.Exit(1)


def _text(outcome: Outcome) -> str:
    figures = outcome.to_json()
    percent = f"{outcome.throughput_of_ideal:.1%}"
    return "\n".join(
        (
            f"throughput   {percent} of the ideal assignment ({figures['tokens_per_s']:,} tokens/s), "
            f"{outcome.throughput_of_placement:.1%} of what the slowest stage allowed",
            f"stages       the slowest had {outcome.stage_balance:.1%} of the mean capacity",
            f"peers        {outcome.joins} joined, {outcome.kills} were lost, {outcome.leaves} left, "
            f"{outcome.moves} moved to another stage",
            f"re-routed    {figures['reroutes']} times: median {figures['reroute_p50_s']} s, "
            f"95 % within {figures['reroute_p95_s']} s",
            f"micro-batches {outcome.micro_batches:,}: {outcome.lost} lost with a peer at some stage, "
            f"{outcome.unexplained} lost otherwise, {outcome.duplicated} counted twice",
            f"rounds       {', '.join(map(str, outcome.rounds))} of the stages; "
            f"{len(outcome.setbacks)} times a stage lost its state with its last replica",
            *(f"BROKEN       {what}" for what in outcome.broken),
            f"trace        {outcome.trace}",
            f"simulated    {outcome.options.end_s:,.0f} s in {outcome.wall_s:.1f} s "
            f"({outcome.cpu_s:.1f} s of CPU)",
        )
    )
