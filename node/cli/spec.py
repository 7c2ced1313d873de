"""`shoal init` and `shoal plan`: write a run.toml, and see what it means before anything runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shoal.node.cli.console import out, print_json


class Template(StrEnum):
    """The run.toml files that `shoal init` writes."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "125m"
    LARGE = "1b"


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.toml"),
    template: Annotated[Template, typer.Option(help="What to start from.")] = Template.TINY,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Write a commented run.toml."""
    from shoal.training import spec_file

    spec_file.write_template(template.value, path)
    if as_json:
        print_json({"path": str(path), "template": template.value})
        return
    out.print(f"wrote {path}", soft_wrap=True)
    out.print(f"next: shoal plan {path}    then: shoal up {path}", soft_wrap=True)


def plan(
    path: Annotated[Path, typer.Argument(metavar="RUN.TOML")],
    as_json: Annotated[bool, typer.Option("--json", help="The same numbers as JSON.")] = False,
) -> None:
    """Show stages, parameters, memory and traffic of a run."""
    from shoal.node.cli.plan_table import plan_json, plan_table
    from shoal.training import spec_file
    from shoal.training.plan import make_plan

    planned = make_plan(spec_file.load(path))
    if as_json:
        print_json(plan_json(planned))
    else:
        out.print(plan_table(planned))
