"""The desk: performs an owner's orders on the owner's folder and writes each into the audit log.

The owner's daemon and the command line beside it work on the same folder, one at a time under its lock. An
order takes effect with the signed lists that `desk` writes; the daemon takes them over and spreads them.
All methods block: off the event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shoal.node.owner.audit import AuditEntry, AuditLog
from shoal.node.owner.home import OwnerHome
from shoal.node.owner.orders import DIRECTED, NAME_CHARACTERS, Order, amend, check_values, text_of
from shoal.protocol.amendments import Amendments
from shoal.protocol.errors import ShoalError, StorageError, UsageError
from shoal.protocol.identity import PeerId, Role, public_key_of
from shoal.protocol.revocation import RevocationList, load_revocations
from shoal.training.amended import AMENDABLE, amended

_LOCK = "orders.lock"
TOKEN_TTL_S = (60.0, 366 * 86400.0)
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

    def tokens(self) -> list[dict[str, object]]:
        """The tokens issued, oldest first."""
        revoked, now = self._revoked().token_ids, self._clock()
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

    def create_token(self, request: Mapping[str, Any]) -> dict[str, object]:
        """A new token, as JSON asks for it. Raises UsageError. The log never sees its text."""
        roles = _roles(request.get("roles", [Role.TRAINER.value]))
        ttl_s = request.get("ttl_s", 7 * 86400.0)
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)):
            raise UsageError("ttl_s has to be a number of seconds")
        if not TOKEN_TTL_S[0] <= ttl_s <= TOKEN_TTL_S[1]:
            raise UsageError(f"a token lives {TOKEN_TTL_S[0]:g} to {TOKEN_TTL_S[1]:g} s (ttl_s = {ttl_s:g})")
        name = text_of(request, "name", NAME_CHARACTERS)
        who, key = text_of(request, "who", NAME_CHARACTERS), text_of(request, "key", NAME_CHARACTERS)
        with self._locked():
            if (done := self._log.with_key(key)) is not None:
                raise UsageError(f"this was done already: {done.text}\na token is shown once; make another")
            token = self._home.issue(roles, float(ttl_s), name, self._clock())
            granted = sorted(token.roles)
            self._note(
                who or "local",
                "token_create",
                {"name": name, "roles": granted, "ttl_s": ttl_s},
                text=f"token {token.token_id} was made",
                changed=True,
                key=key,
            )
        text = token.encode()
        return {
            "id": token.token_id,
            "roles": granted,
            "not_after": token.not_after,
            "token": text,
            "command": f"shoal join {text}",
        }

    def revoke_token(self, request: Mapping[str, Any]) -> AuditEntry:
        """Shut a token out for good. Raises UsageError."""
        token_id = text_of(request, "id", NAME_CHARACTERS)
        who = text_of(request, "who", NAME_CHARACTERS) or "local"
        with self._locked():
            known = {token.token_id for token in self._home.key.tokens()}
            if token_id not in known:
                raise UsageError(
                    f"this owner issued no token {token_id or '(none named)'}\n"
                    "show them with: shoal token list"
                )
            changed = token_id not in self._revoked().token_ids
            if changed:
                self._home.key.revoke(token_ids=[token_id])
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
        if what == "unban":
            raise UsageError("unban is not possible yet")
        if peer in self._revoked().peers:
            return False, f"nothing to do: {_WORDS[what]}"
        self._home.key.revoke(peers=[peer])
        return True, _WORDS[what]

    def _revoked(self) -> RevocationList:
        key = self._home.key
        stored = load_revocations(key.revocations_path, key.run_id, key.root_der)
        return stored[1] if stored else RevocationList()

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
        raise UsageError(f"{order.what} needs the owner's peer to run\nstart it: shoal up run.toml")
    raise UsageError(f"no peer {order.peer!r} is here\nsee them with: shoal peers")


def _is_peer_id(text: str) -> bool:
    try:
        public_key_of(PeerId(text))
    except ShoalError:
        return False
    return True


def _roles(given: object) -> Sequence[Role]:
    try:
        roles = [Role(role) for role in given] if isinstance(given, list) else []
    except ValueError as error:
        raise UsageError(f"{error}\nroles are: {', '.join(Role)}") from error
    if not roles or Role.OWNER in roles:
        raise UsageError("a token grants trainer, inference or observer")
    return roles
