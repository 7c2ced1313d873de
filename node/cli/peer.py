"""`shoal up`, `join`, `status`, `leave`: run a peer on this machine, look at it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.node.cli import dashboard as page
from shoal.node.cli import sinks
from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.units import rate_bytes_per_s, size_bytes, socket_address
from shoal.node.events import json_events, plain_events
from shoal.node.paths import PeerFolder, control_sockets, data_root
from shoal.protocol.errors import PeerUnreachable, UsageError
from shoal.protocol.limits import NAME_CHARACTERS

if TYPE_CHECKING:
    from shoal.node.options import PeerOptions
    from shoal.node.owner.home import OwnerHome
    from shoal.protocol.admission import JoinToken

WATCH_S = 1.0
LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of keys and runs.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Devices = Annotated[
    str | None,
    typer.Option(help="Several, over which the stage is sharded: cuda:0,cuda:1.", show_default=False),
]
HostOptimizer = Annotated[
    bool,
    typer.Option(
        "--host-optimizer", help="Of a GPU's memory give none to the optimizer: fits larger stages."
    ),
]
Memory = Annotated[str | None, typer.Option(help="Most memory to use, like 12GiB.", show_default=False)]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Upload = Annotated[
    str | None, typer.Option(help="Most to send, like 20Mbit; at least 600kbit.", show_default="no limit")
]
Name = Annotated[str, typer.Option(help="What others call this peer.", show_default=False)]
Stage = Annotated[int | None, typer.Option(min=0, help="Serve this stage.", show_default="where needed most")]
Stages = Annotated[
    int, typer.Option("--stages", min=1, max=8, help="Most stages to hold while others do not.")
]
ListenUp = Annotated[str, typer.Option(help="IP address to listen on; 0.0.0.0 for other machines to join.")]
ListenJoin = Annotated[
    str | None, typer.Option(help="IP address to listen on.", show_default="loopback if the owner does")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")]
DhtPort = Annotated[int, typer.Option(min=0, max=65535, help="TCP port of the directory.")]
Announce = Annotated[
    list[str] | None, typer.Option(help="Host under which others reach you.", show_default=False)
]
InferenceShare = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Share of a busy device's time for inference; idle time is free."),
]
Pace = Annotated[float, typer.Option(min=0.0, hidden=True, help="Seconds a micro-batch takes, at least.")]
Decisions = Annotated[
    Path | None,
    typer.Option(
        help="Write down what routing, moves and rounds decide, for shoal simulate --replay.",
        show_default=False,
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(help="Serve /metrics for Prometheus here, like 127.0.0.1:9100.", show_default=False),
]
NoTrain = Annotated[bool, typer.Option("--no-train", help="Take part without a stage.")]


def up(
    path: Annotated[Path, typer.Argument(metavar="RUN.TOML")],
    listen: ListenUp = LOOPBACK,
    port: Port = 0,
    dht_port: DhtPort = 0,
    announce: Announce = None,
    device: Device = "auto",
    devices: Devices = None,
    host_optimizer: HostOptimizer = False,
    memory: Memory = None,
    threads: Threads = None,
    upload: Upload = None,
    name: Name = "owner",
    stage: Stage = None,
    stages: Stages = 1,
    no_train: NoTrain = False,
    inference_share: InferenceShare = 0.125,
    pace: Pace = 0.0,
    decisions: Decisions = None,
    dashboard: page.Address = None,
    dashboard_tls: page.Tls = None,
    dashboard_without_tls: page.WithoutTls = False,
    metrics: Metrics = None,
    tensorboard: sinks.TensorBoardFolder = None,
    wandb: sinks.WandbProject = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Start a run, or your own peer of it, and print how others join."""
    from shoal.training import spec_file

    spec = spec_file.load(path)
    from shoal.node.owner.home import OwnerHome

    options = peer_options(
        device,
        memory,
        threads,
        upload,
        name,
        stage,
        no_train,
        listen,
        port,
        dht_port,
        announce,
        inference_share,
        pace,
        decisions,
        metrics,
        devices=devices,
        host_optimizer=host_optimizer,
        stages_most=stages,
    )
    if dashboard is not None:
        from shoal.node.dashboard.address import dashboard_options

        shown = dashboard_options(dashboard, dashboard_tls, dashboard_without_tls)
        options = dataclasses.replace(options, dashboard=shown)
    root = data_root(data_dir)
    home = OwnerHome.of_run(root, spec, time.time())
    options = dataclasses.replace(options, sinks=sinks.chosen(home, tensorboard, wandb))
    with PeerFolder.claim(root) as folder:
        code = run_peer(home.own_token(time.time()), folder, options, as_json, home)
    raise typer.Exit(code)


def join(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN", help="The token, @FILE, or - for standard input.", show_default=False
        ),
    ],
    listen: ListenJoin = None,
    port: Port = 0,
    dht_port: DhtPort = 0,
    announce: Announce = None,
    device: Device = "auto",
    devices: Devices = None,
    host_optimizer: HostOptimizer = False,
    memory: Memory = None,
    threads: Threads = None,
    upload: Upload = None,
    name: Name = "",
    stage: Stage = None,
    stages: Stages = 1,
    no_train: NoTrain = False,
    inference_share: InferenceShare = 0.125,
    pace: Pace = 0.0,
    decisions: Decisions = None,
    metrics: Metrics = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Join a run with the token its owner gave you."""
    from shoal.protocol.admission import read_token

    parsed, warning = read_token(token)
    if warning:
        note(warning)
    from shoal.node.network import on_loopback

    if listen is None:
        listen = LOOPBACK if all(map(on_loopback, parsed.bootstrap)) else EVERYWHERE
    options = peer_options(
        device,
        memory,
        threads,
        upload,
        name,
        stage,
        no_train,
        listen,
        port,
        dht_port,
        announce,
        inference_share,
        pace,
        decisions,
        metrics,
        devices=devices,
        host_optimizer=host_optimizer,
        stages_most=stages,
    )
    with PeerFolder.claim(data_root(data_dir)) as folder:
        code = run_peer(parsed, folder, options, as_json)
    raise typer.Exit(code)


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show the peers that run on this machine and the swarm as they see it."""
    root = data_root(data_dir)
    if watch:
        asyncio.run(_watch(root, as_json))
    else:
        _show(asyncio.run(_ask_all(root, "status")), as_json)


async def _watch(root: Path, as_json: bool) -> None:
    """The first peer of this machine, until Ctrl-C: live on a terminal, elsewhere a line a change."""
    from rich.live import Live

    from shoal.node.cli.live import change, line, live_view
    from shoal.node.view.snapshot import Snapshot

    live = Live(console=out, auto_refresh=False, screen=True) if out.is_terminal and not as_json else None
    told: object = None
    with live or contextlib.nullcontext():
        while True:
            snapshot = Snapshot.from_json((await _ask_all(root, "snapshot"))[0])
            if live is not None:
                live.update(live_view(snapshot), refresh=True)
            elif change(snapshot) != told:
                told = change(snapshot)
                if as_json:
                    print_json({"at": snapshot.at, **snapshot.brief()})
                else:
                    out.print(line(snapshot), markup=False, soft_wrap=True)
            await asyncio.sleep(WATCH_S)


def leave(
    peer: Annotated[
        str | None, typer.Argument(help="Name or id of one peer.", show_default="all here")
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Ask the peers on this machine to finish what they hold and leave."""
    root = data_root(data_dir)
    left = asyncio.run(_leave(root, peer))
    if as_json:
        print_json({"leaving": left})
    else:
        note(f"asked to leave: {', '.join(left)}")


async def _leave(root: Path, wanted: str | None) -> list[str]:
    from shoal.node.control import ask

    left = []
    for path, found in await daemons(root, "status"):
        if wanted is None or wanted in (found["name"], found["peer"]):
            await ask(path, "leave")
            left.append(str(found["name"]))
    if not left:
        raise UsageError(f"no peer called {wanted!r} runs from {root}\nsee them with: shoal status")
    return left


async def _ask_all(root: Path, do: str) -> list[dict[str, Any]]:
    return [found for _, found in await daemons(root, do)]


async def daemons(root: Path, do: str) -> list[tuple[Path, dict[str, Any]]]:
    """Each daemon's socket and answer. Raises PeerUnreachable when none answers."""
    from shoal.node.control import ask

    found = []
    for path in control_sockets(root):
        try:
            found.append((path, await ask(path, do)))
        except PeerUnreachable:
            continue  # a daemon that was killed left its socket
    if not found:
        raise PeerUnreachable(
            f"no peer runs from {root}\nstart one with: shoal join TOKEN, or shoal up run.toml"
        )
    return found


def _show(statuses: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for found in statuses:
            print_json(found)
        return
    from shoal.node.cli.status_view import status_view

    out.print(status_view(statuses))


def peer_options(
    device: str,
    memory: str | None,
    threads: int | None,
    upload: str | None,
    name: str,
    stage: int | None,
    no_train: bool,
    listen: str,
    port: int,
    dht_port: int,
    announce: list[str] | None,
    inference_share: float,
    pace_s: float,
    decisions: Path | None,
    metrics: str | None,
    *,
    devices: str | None = None,
    host_optimizer: bool = False,
    stages_most: int = 1,
) -> PeerOptions:
    if devices is not None and device != "auto":
        raise UsageError("--device names one device, --devices several: give one of the two")
    memory_bytes = None if memory is None else size_bytes(memory)
    upload_bytes_per_s = None if upload is None else rate_bytes_per_s(upload)
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise UsageError(f"--name takes at most {NAME_CHARACTERS} printable characters")
    from shoal.node.options import PeerOptions
    from shoal.node.presence import Listening
    from shoal.protocol.uplink import require_upload

    require_upload(upload_bytes_per_s)
    listening = Listening(host=listen, port=port, dht_port=dht_port, announce=tuple(announce or ()))
    return PeerOptions(
        devices=tuple((devices or device).split(",")),
        host_optimizer=host_optimizer,
        memory_bytes=memory_bytes,
        threads=threads,
        upload_bytes_per_s=upload_bytes_per_s,
        name=name,
        stage=stage,
        stages_most=stages_most,
        train=not no_train,
        inference_share=inference_share,
        pace_s=pace_s,
        decisions=decisions,
        metrics=None if metrics is None else socket_address(metrics),
        listening=listening,
    )


def run_peer(
    token: JoinToken, folder: PeerFolder, options: PeerOptions, as_json: bool, owner: OwnerHome | None = None
) -> int:
    """Run a daemon to its end; JSON lines, plain ones, or on a terminal a bar below them. The exit code."""
    from shoal.node.daemon import run_daemon

    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    if as_json or not out.is_terminal:
        events = json_events(sys.stdout) if as_json else plain_events(sys.stdout)
        return run_daemon(token, folder, options, events, owner)
    from shoal.node.cli.terminal import Terminal

    with Terminal(out) as terminal:
        return run_daemon(token, folder, options, terminal.tell, owner, terminal.show)
