"""Where the figures of `shoal up` go besides the page: TensorBoard's files, wandb's runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoal.node.owner.home import OwnerHome
    from shoal.node.sinks.telling import Sink

TensorBoardFolder = Annotated[
    Path | None,
    typer.Option("--tensorboard", help="Write the run's figures there for TensorBoard.", show_default=False),
]
WandbProject = Annotated[
    str | None,
    typer.Option("--wandb", help="Send the run's figures to this project of wandb.", show_default=False),
]


def chosen(home: OwnerHome, tensorboard: Path | None, wandb: str | None) -> tuple[Sink, ...]:
    """Raises UsageError and StorageError."""
    from shoal.node.sinks.tensorboard import TensorBoard
    from shoal.node.sinks.wandb import Wandb

    found: list[Sink] = []
    if tensorboard is not None:
        found.append(TensorBoard(tensorboard))
    if wandb is not None:
        found.append(Wandb(wandb, home.key.run_name, home.key.run_id.hex(), home.folder))
    return tuple(found)
