"""The sink that Weights & Biases reads. Blocking; `telling` calls it in a thread.

The library finds its key by itself (`wandb login`, WANDB_API_KEY); WANDB_MODE=offline writes files only,
which `wandb sync` sends later. Its helper process ends with ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from shoal.node.sinks.extra import require_extra
from shoal.node.sinks.scalars import Scalar
from shoal.protocol.errors import UsageError


class Wandb:
    """One run there for one of ours, also after the owner's peer was away."""

    title = "wandb"

    def __init__(self, project: str, name: str, run_id: str, folder: Path) -> None:
        """`folder`: where it keeps its files. Raises UsageError without the package, or without a key."""
        require_extra("wandb", "--wandb")
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UsageError(
                "--wandb finds no key of yours\n"
                "give it one with: wandb login; or write files only: export WANDB_MODE=offline"
            )
        self.fresh = not any(folder.glob(f"wandb/*run-*-{run_id[:16]}"))
        self._project, self._name, self._id, self._folder = project, name, run_id[:16], folder
        self._run: Any = None

    def write(self, scalars: Sequence[Scalar]) -> None:
        """The library sends them when it likes."""
        if self._run is None:
            self._run = self._begun()
        for (tokens, at), points in groupby(scalars, key=lambda scalar: (scalar.tokens, scalar.at)):
            values = {name: value for name, value, _, _ in points}
            self._run.log({"tokens": tokens, "unix_s": at, **values})

    def close(self) -> None:
        """Its helper has written everything, and is gone."""
        if self._run is not None:
            import wandb

            self._run.finish()
            wandb.teardown()
            self._run = None

    def _begun(self) -> Any:
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        run = wandb.init(
            project=self._project,
            name=self._name,
            id=self._id,
            resume="allow",
            dir=str(self._folder),
            settings=settings,
        )
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run
