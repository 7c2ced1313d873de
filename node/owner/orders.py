"""What the owner can order: checked once where it comes in, and what it makes of the signed list. Pure.

The control socket and the command line make an `Order` or a `TokenOrder` of what they are given; `desk`
performs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shoal.protocol import limits
from shoal.protocol.amendments import DRAIN, KICK, PAUSED, RUNNING, STOPPED, Amendments, Errand, Setting
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import Role
from shoal.training.amended import AMENDABLE, checked
from shoal.training.spec import RunSpec

STATES = {"pause": PAUSED, "resume": RUNNING, "stop": STOPPED}
DIRECTED = frozenset({"drain", "kick", "ban", "unban"})  # name a peer
KINDS = (*STATES, "set", "checkpoint", *sorted(DIRECTED))
NAME_CHARACTERS = 64
REASON_CHARACTERS = 200
TOKEN_TTL_S = 1.0, 366 * 86400.0
WEEK_S = 7 * 86400.0
GRANTED = (Role.INFERENCE, Role.OBSERVER, Role.TRAINER)  # an owner's token is made by hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One order. `who`: the page's session or the command line; the same `key` twice is one order."""

    what: str  # one of KINDS
    who: str
    key: str = ""
    peer: str = ""  # id or name, of those that name a peer
    reason: str = ""
    values: tuple[tuple[str, float], ...] = ()  # of set

    def arguments(self) -> dict[str, object]:
        """As the audit log shows them."""
        found: dict[str, object] = {"peer": self.peer, "reason": self.reason, "values": dict(self.values)}
        return {name: value for name, value in found.items() if value}


def parse_order(request: Mapping[str, Any]) -> Order:
    """An order from JSON. Raises UsageError."""
    what = request.get("what")
    if what not in KINDS:
        raise UsageError(f"{str(what)[:NAME_CHARACTERS]!r} is no order\nthere are: {', '.join(KINDS)}")
    order = Order(
        what=what,
        who=text_of(request, "who", NAME_CHARACTERS) or "local",
        key=text_of(request, "key", NAME_CHARACTERS),
        peer=text_of(request, "peer", NAME_CHARACTERS) if what in DIRECTED else "",
        reason=text_of(request, "reason", REASON_CHARACTERS) if what in DIRECTED else "",
        values=_values(request.get("values")) if what == "set" else (),
    )
    if what in DIRECTED and not order.peer:
        raise UsageError(f"{what} needs a peer: its id or its name")
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOrder:
    """A token to be made."""

    roles: tuple[Role, ...]
    ttl_s: float
    who: str
    name: str = ""  # for whom
    key: str = ""


def parse_token_order(request: Mapping[str, Any]) -> TokenOrder:
    """From JSON. Raises UsageError."""
    given, ttl_s = request.get("roles", [Role.TRAINER.value]), request.get("ttl_s", WEEK_S)
    roles = given if isinstance(given, list) and len(given) <= len(Role) else []
    if not roles or any(role not in GRANTED for role in roles):
        raise UsageError(f"a token grants one or more of {', '.join(GRANTED)}")
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)):
        raise UsageError("ttl_s has to be a number of seconds")
    if not TOKEN_TTL_S[0] <= ttl_s <= TOKEN_TTL_S[1]:
        raise UsageError(f"a token lives {TOKEN_TTL_S[0]:g} to {TOKEN_TTL_S[1]:g} s")
    return TokenOrder(
        roles=tuple(map(Role, roles)),
        ttl_s=float(ttl_s),
        who=text_of(request, "who", NAME_CHARACTERS) or "local",
        name=text_of(request, "name", limits.NAME_CHARACTERS),
        key=text_of(request, "key", NAME_CHARACTERS),
    )


def text_of(request: Mapping[str, Any], name: str, most: int) -> str:
    """A short printable text, empty if absent. Raises UsageError."""
    value = request.get(name, "")
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise UsageError(f"{name} has to be text of at most {most} printable characters")
    return value


def check_values(order: Order, spec: RunSpec) -> None:
    """Whether this run's spec admits the values of a set. Raises UsageError."""
    for key, value in order.values:
        try:
            checked(spec, key, value)
        except ValueError as error:
            raise UsageError(f"{key} = {value:g} is refused: {_reason(error)}") from error


def amend(order: Order, coming: Amendments, spec: RunSpec, target: tuple[str, int] | None) -> Amendments:
    """The list with an order in it; `coming` itself where it is in it already.

    `coming` has the version to come. `target`: peer id and newest incarnation, of drain and kick.
    """
    if order.what in STATES:
        return replace(coming, state=STATES[order.what])
    if order.what == "set":
        return replace(coming, settings=_settings(order, coming, spec))
    if order.what in (DRAIN, KICK) and target is not None:
        peer, incarnation = target
        known = (e for e in coming.errands if (e.kind, e.peer) == (order.what, peer))
        if any(errand.incarnation >= incarnation for errand in known):
            return coming
        errand = Errand(coming.version, order.what, peer, incarnation, order.reason)
        return replace(coming, errands=(*coming.errands, errand)[-limits.ERRANDS :])
    return coming


def _settings(order: Order, coming: Amendments, spec: RunSpec) -> tuple[Setting, ...]:
    """With the new values; where there are too many, without the oldest that a later one has replaced."""
    found = list(coming.settings)
    for key, value in order.values:
        section, _, name = key.partition(".")
        current = float(getattr(getattr(spec, section), name))
        for setting in found:
            current = setting.value if setting.key == key else current
        if current != value:
            found.append(Setting(coming.version, key, value))
    while len(found) > limits.AMENDED_SETTINGS:
        later = [{setting.key for setting in found[at + 1 :]} for at in range(len(found))]
        del found[next(at for at, setting in enumerate(found) if setting.key in later[at])]
    return tuple(found)


def _values(given: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, Mapping) or not given or len(given) > len(AMENDABLE):
        raise UsageError(f"set needs values\nthese can be set: {', '.join(AMENDABLE)}")
    found = []
    for key, value in given.items():
        if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{str(key)[:NAME_CHARACTERS]} needs a number")
        if key not in AMENDABLE:
            raise UsageError(
                f"{key[:NAME_CHARACTERS]} cannot be changed in a run\n"
                f"these can be set: {', '.join(AMENDABLE)}"
            )
        try:
            found.append((key, float(value)))
        except OverflowError as error:
            raise UsageError(f"{key} needs a smaller number") from error
    return tuple(found)


def _reason(error: ValueError) -> str:
    lines = str(error).splitlines()
    return lines[2].strip() if len(lines) > 2 else lines[0]
