"""Puts the commands together, and turns errors into a message and an exit code. Called as `shoal`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shoal.node.cli import (
    checkpoint,
    dashboard,
    demo,
    events,
    inference,
    peer,
    peers,
    run,
    serve,
    serve_model,
    simulate,
    spec,
    tokens,
)
from shoal.node.cli.console import explain, print_json, report_bug
from shoal.node.parent import die_with_parent
from shoal.node.version import VERSION
from shoal.protocol.errors import ShoalError

EXIT_CODES = (
    "Exit codes: 0 ok, 1 a demo that did not hold, 2 usage, 10 token refused, 11 nobody answered, "
    "14 hardware too small, 15 run.toml wrong, 20 disk, 70 internal error, 130 Ctrl-C after a clean drain."
)

app = typer.Typer(
    name="shoal",
    help="Train one model on many computers that do not trust the network between them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(spec.init)
app.command()(spec.plan)
app.command()(peer.up)
app.command()(peer.join)
app.command()(peer.status)
app.command()(peer.leave)
app.command()(events.events)
app.command()(events.replay)
app.command()(peers.peers)
app.add_typer(peers.app, name="peer")
app.add_typer(run.app, name="run")
app.command()(dashboard.dashboard)
app.add_typer(tokens.app, name="token")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(inference.generate)
app.command()(inference.chat)
app.command()(serve.serve)
app.command("serve-model")(serve_model.serve_model)
app.command()(demo.demo)
app.command()(simulate.simulate)


@app.command("version")
def show_version(as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": VERSION})
    else:
        typer.echo(VERSION)


def main() -> None:
    """Run the command line and exit with a code of the table in the help."""
    die_with_parent()
    try:
        app()
    except ShoalError as error:
        explain(error)
        sys.exit(error.exit_code)
    except Exception as error:  # the process's edge: a bug of ours, kept whole for a report
        report_bug(error)
        sys.exit(ShoalError.exit_code)
