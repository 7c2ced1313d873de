"""`python -m shoal.node.rank_process`: one device of a peer that has several, a child of its daemon.

Standard input has the setting, then the peer's commands, a line each; the process ends with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue

import torch

from shoal.node.parent import die_with_parent
from shoal.training.devices.gang import follow
from shoal.training.devices.ranks import join


def main() -> None:
    """Until the peer is gone."""
    die_with_parent()
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    setting = json.loads(lines.get())
    torch.set_num_threads(setting["threads"])
    try:
        devices, meeting = tuple(setting["devices"]), Path(setting["meeting"])
        ranks = join(setting["rank"], devices, meeting, setting["answer_s"])
        follow(ranks, iter(lines.get, ""))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: backends may wait for the others when they are taken down


def _listen(lines: SimpleQueue[str]) -> None:
    """Reading on a thread of its own: the end is noticed in the middle of a collective, too."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
