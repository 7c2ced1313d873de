"""The process that the workers of the fault tests are forked from: `python tests/fault_nursery.py`.

It imports everything once, then forks a worker for each order, a line of JSON on its standard input, so that
a new worker takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

import torch
from fault_orders import LINE_BYTES, Order
from fault_worker import Worker
from pipeline_worker import PipelineWorker

from shoal.protocol.allocator import keep_freed_memory


async def work(order: Order) -> None:
    """A worker's life."""
    reader, writer = await asyncio.open_unix_connection(order.socket, limit=LINE_BYTES)
    writer.write(json.dumps({"number": order.number, "incarnation": order.incarnation}).encode() + b"\n")
    worker = Worker(order, writer) if order.stage is None else PipelineWorker(order, writer)
    await worker.live(reader)
    writer.close()


def child(order: Order) -> None:
    """What the fork does instead of the nursery's loop."""
    errors = os.open(order.errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.close(0)
    keep_freed_memory()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(work(order))


def nursery() -> None:
    """Fork a worker for each line, until standard input closes."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # imports torch's compiler, 1.2 s of CPU
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child(Order(**json.loads(line)))
            os._exit(0)


if __name__ == "__main__":
    nursery()
