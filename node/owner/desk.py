"""The desk: performs an owner's orders on the owner's folder and writes each into the audit log.

The owner's daemon and the command line beside it work on the same folder, one at a time under its lock. An
order takes effect with the signed lists that `desk` writes; the daemon takes them over and spreads them.
All methods block: off the event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shoal.node.owner.audit import AuditEntry, AuditLog
from shoal.node.owner.home import OwnerHome
from shoal.node.owner.orders import DIRECTED, Order, TokenOrder, amend, check_values
from shoal.protocol.amendments import Amendments
from shoal.protocol.errors import ShoalError, StorageError, UsageError
from shoal.protocol.identity import PeerId, public_key_of
from shoal.training.amended import AMENDABLE, amended

_LOCK = "orders.lock"
_WORDS = {
    "pause": "the run is paused: drivers begin nothing new",
    "resume": "the run goes on",
    "stop": "the run is stopped: peers finish what they hold and leave",
    "drain": "it finishes what it holds and leaves",
    "kick": "it leaves at once, and may come back",
    "ban": "it is shut out",
    "unban": "it may come back",
}
# Peer id -> (name, incarnation) of those who are here.
Here = Mapping[PeerId, tuple[str, int]]


class OrderDesk:
    """See the module."""

    def __init__(self, home: OwnerHome, clock: Callable[[], float] = time.time) -> None:
        self._home = home
        self._clock = clock
        self._log = AuditLog(home.folder)

    def perform(self, order: Order, here: Here | None = None) -> AuditEntry:
        """Its entry in the log. Raises UsageError or StorageError for what cannot be, which is logged too.

        `here`: the peers of the live swarm, None where no daemon tells.
        """
        with self._locked():
            if (done := self._log.with_key(order.key)) is not None:
                return done
            try:
                changed, text = self._perform(order, here)
            except ShoalError as error:
                first = str(error).partition("\n")[0]
                self._note(order.who, order.what, order.arguments(), text=f"refused: {first}", refused=True)
                raise
            return self._note(
                order.who, order.what, order.arguments(), text=text, changed=changed, key=order.key
            )

    def done(self, key: str) -> AuditEntry | None:
        """What was performed under this key."""
        with self._locked():
            return self._log.with_key(key)

    def note(self, order: Order, text: str) -> AuditEntry:
        """An order that was performed elsewhere."""
        with self._locked():
            return self._note(
                order.who, order.what, order.arguments(), text=text, changed=True, key=order.key
            )

    def overview(self, most: int, before: int | None) -> dict[str, object]:
        """The log's newest entries first, and what is in force as last ordered."""
        with self._locked():
            entries, listed = self._log.entries(), self._home.key.amendments()
        shown = [e for e in reversed(entries) if before is None or e.number < before][:most]
        values = _current(self._home, listed)
        return {
            "orders": [entry.to_json() for entry in shown],
            "total": entries[-1].number if entries else 0,
            "state": listed.state,
            "version": listed.version,
            "values": values,
        }

    # --- tokens

    def tokens(self) -> list[dict[str, Any]]:
        """The tokens issued, oldest first."""
        revoked, now = self._home.key.revocations().token_ids, self._clock()
        return [
            {
                "id": token.token_id,
                "name": token.name,
                "roles": sorted(role.value for role in token.roles),
                "state": (
                    "revoked" if token.token_id in revoked else "expired" if token.not_after < now else "good"
                ),
                "not_after": token.not_after,
            }
            for token in self._home.key.tokens()
        ]

    def create_token(self, order: TokenOrder) -> dict[str, Any]:
        """A new token, which the log never sees. Raises UsageError, also where the order's key was used."""
        with self._locked():
            if (done := self._log.with_key(order.key)) is not None:
                raise UsageError(f"this was done already: {done.text}\na token is shown once; make another")
            token = self._home.issue(order.roles, order.ttl_s, order.name, self._clock())
            granted = sorted(role.value for role in token.roles)
            arguments = {"name": order.name, "roles": granted, "ttl_s": order.ttl_s}
            words = f"token {token.token_id} was made"
            self._note(order.who, "token_create", arguments, text=words, changed=True, key=order.key)
        text = token.encode()
        return {
            "id": token.token_id,
            "roles": granted,
            "not_after": token.not_after,
            "token": text,
            "command": f"shoal join {text}",
        }

    def revoke_token(self, token_id: str, who: str) -> AuditEntry:
        """Shut a token out for good. Raises UsageError."""
        with self._locked():
            key = self._home.key
            if token_id not in {token.token_id for token in key.tokens()}:
                raise UsageError(f"this owner issued no token {token_id}\nshow them with: shoal token list")
            changed = token_id not in key.revocations().token_ids
            if changed:
                key.revoke(token_ids=[token_id])
            text = f"token {token_id} {'is' if changed else 'was already'} shut out"
            return self._note(who, "token_revoke", {"id": token_id}, text=text, changed=changed)

    # --- inside

    def _perform(self, order: Order, here: Here | None) -> tuple[bool, str]:
        """Whether it changed something, and the result in words."""
        if order.what == "checkpoint":
            raise UsageError("a checkpoint is gathered by a running peer\nstart one: shoal up run.toml")
        key, spec = self._home.key, self._home.spec.spec
        target = _target(order, here) if order.what in DIRECTED else None
        if target is not None and order.what in ("ban", "unban"):
            return self._ban(PeerId(target[0]), order.what)
        check_values(order, spec)
        before = key.amendments().version
        after = key.amend(lambda coming: amend(order, coming, spec, target))
        changed = after.version > before
        if order.what == "set":
            words = ", ".join(f"{name} = {value:g}" for name, value in order.values)
            words += " from the next round on"
        else:
            words = _WORDS[order.what]
        return changed, words if changed else f"nothing to do: {words}"

    def _ban(self, peer: PeerId, what: str) -> tuple[bool, str]:
        if (peer in self._home.key.revocations().peers) == (what == "ban"):
            return False, f"nothing to do: {_WORDS[what]}"
        if what == "ban":
            self._home.key.revoke(peers=[peer])
        else:
            self._home.key.pardon(peer)
        return True, _WORDS[what]

    def _note(
        self,
        who: str,
        what: str,
        arguments: Mapping[str, object],
        *,
        text: str,
        changed: bool = False,
        refused: bool = False,
        key: str = "",
    ) -> AuditEntry:
        return self._log.append(
            AuditEntry(
                number=0,
                at_unix_s=round(self._clock(), 3),
                who=who,
                what=what,
                arguments=arguments,
                changed=changed,
                refused=refused,
                version=self._home.key.amendments().version,
                text=text,
                key=key,
            )
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._home.folder / _LOCK
        try:
            with path.open("ab") as file:
                path.chmod(0o600)
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise StorageError(f"cannot use {path}: {error.strerror or error}") from error


def _current(home: OwnerHome, listed: Amendments) -> dict[str, object]:
    """What each key that can be set is set to, in force now or from the next round on."""
    values = amended(home.spec.spec, listed.settings).model_dump()
    split = (key.partition(".") for key in AMENDABLE)
    return {f"{section}.{name}": values[section][name] for section, _, name in split}


def _target(order: Order, here: Here | None) -> tuple[str, int]:
    """Peer id and incarnation of whom an order names. Raises UsageError."""
    named = [
        (peer, incarnation)
        for peer, (name, incarnation) in (here or {}).items()
        if order.peer in (peer, name)
    ]
    if len(named) == 1:
        return named[0]
    if named:
        ids = ", ".join(peer for peer, _ in named)
        raise UsageError(f"{len(named)} peers are called {order.peer!r}: {ids}\nname one by its id")
    if order.what in ("ban", "unban") and _is_peer_id(order.peer):
        return order.peer, 0  # who is not here can be shut out, too
    if here is None:
        either = ", or the peer's whole id" if order.what in ("ban", "unban") else ""
        raise UsageError(f"{order.what} needs the owner's peer to run{either}\nstart it: shoal up run.toml")
    raise UsageError(f"no peer {order.peer!r} is here\nsee them with: shoal peers")


def _is_peer_id(text: str) -> bool:
    try:
        public_key_of(PeerId(text))
    except ShoalError:
        return False
    return True
