"""Bootstrap: reach at least one peer of the swarm through given addresses. `joining` uses it again and again.

All addresses are dialled at once and each fails for its own reason; the first that answers is enough.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from shoal.dht.addresses import Multiaddress
from shoal.protocol.errors import AccessError, BootstrapFailed, NetworkError, ShoalError, UsageError
from shoal.protocol.identity import PeerId

ADDRESS_DEADLINE_S = 6.0  # libp2p gives up after 5 s, with a reason; it dials all routes of a peer together

Dial = Callable[[Multiaddress], Awaitable[None]]


class Bootstrap:
    """The addresses of one start, and why those that failed did so.

    `dial` connects to one address and has the peer answer a DHT call; it raises an error whose text is the
    reason. It is cancelled after `deadline_s`.
    """

    def __init__(
        self,
        me: PeerId,
        addresses: tuple[str, ...],
        dial: Dial,
        deadline_s: float = ADDRESS_DEADLINE_S,
    ) -> None:
        self.failures: dict[str, str] = {}  # address -> reason, of the latest attempt
        self._dial = dial
        self._deadline_s = deadline_s
        self._targets: list[Multiaddress] = []
        self._dials: set[asyncio.Task[bool]] = set()
        for text in addresses:
            try:
                target = Multiaddress.parse(text)
            except UsageError as error:
                self.failures[text[:160]] = f"malformed: {error}"
                continue
            if target.peer != me:
                self._targets.append(target)

    async def once(self, reached: frozenset[PeerId] = frozenset()) -> None:
        """Return when one address answered; the others are dialled to their end meanwhile.

        Peers in `reached` are not dialled. Raises BootstrapFailed, with the reason of each address, when none
        answered and nobody is reached already. No address but our own: nothing to do.
        """
        await self.close()  # dials of an earlier attempt
        targets = [target for target in self._targets if target.peer not in reached]
        if not targets and (reached or not self.failures):
            return
        self._dials = {asyncio.create_task(self._try(target)) for target in targets}
        pending = set(self._dials)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(task.result() for task in done):
                return
        if not reached:
            raise BootstrapFailed(self.explain())

    def explain(self) -> str:
        """Each failed address with its reason, and what to do."""
        lines = "".join(f"\n  {address}: {reason}" for address, reason in self.failures.items())
        return (
            f"none of {len(self._targets) or len(self.failures)} bootstrap addresses answered:{lines}\n"
            "Check this machine's network, or ask for a fresh token: the peers of this one may have moved."
        )

    async def close(self) -> None:
        """Stop dialling."""
        dials, self._dials = self._dials, set()
        for task in dials:
            task.cancel()
        if dials:
            await asyncio.wait(dials)

    async def _try(self, target: Multiaddress) -> bool:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._dial(target)
        except TimeoutError:
            self.failures[target.text] = f"timed out: no answer within {self._deadline_s:g} s"
            return False
        except (ShoalError, OSError) as error:
            self.failures[target.text] = str(error) or type(error).__name__
            return False
        self.failures.pop(target.text, None)
        return True


async def check_port(target: Multiaddress) -> None:
    """Raises NetworkError if nothing listens there.

    Asked before libp2p is: its reasons are vague, and it makes later dials to the same address wait for up
    to five minutes ("dial backoff").
    """
    if not target.is_tcp:
        return
    try:
        _, writer = await asyncio.open_connection(target.host, target.port)
    except ConnectionRefusedError:
        raise NetworkError(f"refused: nothing listens on port {target.port} of {target.host}") from None
    except socket.gaierror as error:
        raise NetworkError(f"unknown host: {target.host} ({error.strerror})") from None
    except OSError as error:
        raise NetworkError(f"unreachable: {error.strerror or error}") from None
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def libp2p_reason(text: str, target: Multiaddress) -> ShoalError:
    """libp2p's report of a failed dial as an error of ours, its reason first."""
    lines = [line for line in text.splitlines() if f"[{target.route}]" in line] or text.splitlines()[-1:]
    detail = " ".join(lines).partition("] ")[2] or " ".join(lines)
    if "peer id mismatch" in detail:
        actual = detail.rpartition("remote key matches ")[2].split()[0]
        return AccessError(f"wrong peer id: {actual} answers there, not {target.peer}")
    for sign, reason in (
        ("connection refused", "refused"),
        ("deadline exceeded", "timed out"),
        ("timeout", "timed out"),
        ("dial backoff", "failed a moment ago"),
        ("protocols not supported", "not a peer of a swarm"),
    ):
        if sign in detail:
            return NetworkError(f"{reason}: {detail[:200]}")
    return NetworkError(f"failed: {detail[:200]}")
