"""The daemon's side of the page: binds its port, starts its process, starts it again, hands out login links.

The listening socket is the child's standard input, so a wrong address is refused when the daemon starts, and
what connects while the page restarts just waits. Whatever becomes of the page, training does not notice:
after a few crashes in a row it stays away until somebody asks for a new link.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from shoal.node import parent
from shoal.node.control import Action
from shoal.node.dashboard.address import DashboardOptions, certificate_names
from shoal.node.dashboard.logins import LoginCodes
from shoal.node.events import Events
from shoal.node.network import announced_addresses
from shoal.protocol.errors import UsageError

CRASHES, CRASHES_S = 5, 600.0  # so many in so long a time, and it is left alone
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
_NICENESS = 5  # a page that is slow for a moment is better than a training step that is
_BACKLOG = 128


class Dashboard:
    """One per daemon. Make it with `dashboard`."""

    def __init__(
        self, options: DashboardOptions, listener: socket.socket, control: Path, events: Events
    ) -> None:
        self._options, self._listener, self._control, self._events = options, listener, control, events
        self._codes = LoginCodes(asyncio.get_running_loop().time)
        self._wanted = asyncio.Event()

    @property
    def actions(self) -> dict[str, Action]:
        """For the control socket."""
        return {"dashboard_login": self._answer_login, "dashboard_link": self._answer_link}

    def link(self) -> str:
        """A new one-time login link."""
        return f"{self._options.scheme}://{self._address()}/login?code={self._codes.issue()}"

    def _address(self) -> str:
        """As the certificate calls this machine, else as it is reached."""
        host, port = self._listener.getsockname()[:2]
        for name in certificate_names(self._options.certificate) if self._options.certificate else ():
            if "*" not in name:
                return f"{name}:{port}"
        return announced_addresses(host, port, ())[0]

    async def run(self) -> None:
        """Keep the page's process alive until cancelled."""
        loop = asyncio.get_running_loop()
        crashed: deque[float] = deque(maxlen=CRASHES)
        url = self.link()
        self._events(
            "dashboard-link", {"url": url, "text": f"the run's page, this link signs in once: {url}"}
        )
        while True:
            try:
                code = await self._once()
            except OSError as error:  # no memory for it, or no descriptor
                code = error.errno or errno.EIO
            crashed.append(loop.time())
            recent = [at for at in crashed if at > loop.time() - CRASHES_S]
            if len(recent) == CRASHES:
                text = f"the page ended {CRASHES} times and stays away; shoal dashboard starts it again"
                self._events("dashboard-down", {"code": code, "text": text})
                crashed.clear()
                self._wanted.clear()
                await self._wanted.wait()
                continue
            text = f"the page ended ({code}) and is started again; training goes on"
            self._events("dashboard-restarted", {"code": code, "text": text})
            await asyncio.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (len(recent) - 1)))

    async def _once(self) -> int:
        """Run the process to its end; its exit code. Cancelled, it takes the process along."""
        tls = [str(path) for path in (self._options.certificate, self._options.key) if path is not None]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "shoal.node.dashboard",
            str(self._control),
            *tls,
            stdin=self._listener.fileno(),
            stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, parent.ENVIRONMENT_KEY: str(os.getpid())},
            start_new_session=True,  # Ctrl-C in a terminal is for the daemon
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        try:
            return await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # it keeps nothing that would have to be put in order
            await process.wait()

    async def _answer_login(self, request: Mapping[str, Any]) -> object:
        return {"right": self._codes.redeem(request.get("code"))}

    async def _answer_link(self, request: Mapping[str, Any]) -> object:
        self._wanted.set()
        return {"url": self.link()}


@contextlib.asynccontextmanager
async def dashboard(
    options: DashboardOptions | None, control: Path, events: Events
) -> AsyncIterator[Dashboard | None]:
    """Bound while the context lasts; None without options. Raises UsageError if the address cannot be had."""
    if options is None:
        yield None
        return
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"the page cannot listen on {options.host}:{options.port} ({error.strerror})\n"
            "name another port: --dashboard 127.0.0.1:0 takes any free one"
        ) from error
    with listener:
        yield Dashboard(options, listener, control, events)
