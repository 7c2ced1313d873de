"""`shoal run status|pause|resume|set|stop`: what the owner decides of the whole run."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

from shoal.node.cli.console import note, out, print_json
from shoal.node.cli.orders import AsJson, DataDir, Run, Yes, order, overview
from shoal.protocol.errors import UsageError

app = typer.Typer(help="Look at the run, pause it, change it, end it (its owner only).", no_args_is_help=True)


@app.command()
def status(run: Run = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what is in force, and the last orders."""
    found = overview(run, data_dir)
    if as_json:
        print_json(found)
        return
    out.print(f"run {found['run']} ({found['run_id'][:8]}): {found['state']}", highlight=False)
    table = Table("key", "value")
    for key, value in found["values"].items():
        table.add_row(key, f"{value:g}")
    out.print(table)
    for entry in reversed(found["orders"]):
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["at_unix_s"]))
        note(f"{at}  {entry['who']}: {entry['what']} {entry['arguments'] or ''} {entry['text']}")
    if not found["owner_runs"]:
        note("the owner's peer does not run here; start it with: shoal up run.toml")


@app.command()
def pause(run: Run = None, yes: Yes = False, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Begin no new work anywhere; peers stay, joiners come in, and nothing is lost."""
    order("pause", "Pause training", run=run, data_dir=data_dir, yes=yes, as_json=as_json)


@app.command()
def resume(run: Run = None, yes: Yes = False, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Go on, where it was paused or stopped."""
    order("resume", "Go on with training", run=run, data_dir=data_dir, yes=yes, as_json=as_json)


@app.command("set")
def set_(
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="As in run.toml.")],
    run: Run = None,
    yes: Yes = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Change the learning rate or the inner steps a round, from every stage's next round on."""
    wanted = dict(map(_setting, values))
    order(
        "set",
        f"Set {', '.join(values)}",
        run=run,
        data_dir=data_dir,
        yes=yes,
        as_json=as_json,
        values=wanted,
    )


@app.command()
def stop(run: Run = None, yes: Yes = False, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End the run: peers finish what they hold and leave; the owner's own stays and tells who comes late."""
    order("stop", "Send everybody home", run=run, data_dir=data_dir, yes=yes, as_json=as_json)


def _setting(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), float(value.replace("_", ""))
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not KEY=VALUE with a number\nfor instance: inner.learning_rate=0.001"
        ) from error
