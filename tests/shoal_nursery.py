"""The process that `shoal` processes of the tests are forked from: `python tests/shoal_nursery.py FD`.

It imports everything once, since the imports are most of what the start of a peer costs, and forks for each
order that `forked` sends over the socket FD. A fork leads a session of its own, and dies with the nursery.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

ORDER_BYTES = 128 * 1024
FDS = 3  # standard output, standard error, and where the nursery tells pid and exit code
_MODULES = (
    "shoal.node.cli",
    "shoal.node.daemon",
    "shoal.node.owner.home",
    "shoal.node.trainee",
    "shoal.training.spec_file",
    "shoal.compression.numba_kernels",
)


def child(order: dict[str, Any], fds: list[int], kept: list[int]) -> None:
    """What the fork does instead of the nursery's loop. Raises SystemExit."""
    from shoal.node import parent
    from shoal.node.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in (*fds, *kept):
        os.close(fd)
    os.environ.clear()
    os.environ.update(order["environment"], **{parent.ENVIRONMENT_KEY: str(os.getppid())})
    os.chdir(order["folder"])
    sys.argv = ["shoal", *order["arguments"]]
    main()


def nursery(orders: socket.socket) -> None:
    """Fork for each order and tell how each fork ended, until nobody sends any more."""
    ended: dict[int, tuple[int, int]] = {}  # pidfd -> pid, where its exit code is told
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in ended:
                pid, told = ended.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                poll.unregister(ready)
                _tell(told, code)
                os.close(told)
                os.close(ready)
                continue
            message, fds, _, _ = socket.recv_fds(orders, ORDER_BYTES, FDS)
            if not message:
                return
            begun, beginning = os.pipe()
            if (pid := os.fork()) == 0:
                os.setsid()  # so that a kill of its group finds it
                os.close(begun)
                os.close(beginning)
                kept = [orders.detach(), *ended, *(told for _, told in ended.values())]
                child(json.loads(message), fds, kept)
                return
            os.close(beginning)
            os.read(begun, 1)  # nothing comes; it ends when the child has closed its side, or is dead
            os.close(begun)
            os.close(fds[0])
            os.close(fds[1])
            _tell(fds[2], pid)
            watched = os.pidfd_open(pid)
            ended[watched] = (pid, fds[2])
            poll.register(watched, select.POLLIN)


def _tell(fd: int, number: int) -> None:
    try:
        os.write(fd, b"%d\n" % number)
    except BrokenPipeError:
        return  # whoever ordered it has gone


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _MODULES:
        importlib.import_module(name)
    warm_up = importlib.import_module("shoal.node.hardware").warm_up
    warm_up()  # imports torch's compiler, which each fork did for itself: 0.9 s of CPU
    gc.freeze()  # what all share is not written to
    nursery(socket.socket(fileno=int(sys.argv[1])))
