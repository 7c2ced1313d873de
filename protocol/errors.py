"""Every error Shoal raises on purpose, as one tree.

    ShoalError
    ├── UsageError              the command line or an argument is wrong
    ├── SpecError               run.toml is wrong
    ├── AccessError             a token, certificate or role does not grant this
    │   ├── TokenInvalid, TokenExpired, TokenRevoked
    │   └── ChainInvalid, BindingInvalid, WrongRun, WrongRole
    ├── ProtocolViolation       a peer sent bytes that break the protocol
    │   └── MessageInvalid, MessageTooLarge, FrameInvalid, RecordInvalid
    ├── NetworkError            a peer or the network did not do its part in time
    │   ├── BootstrapFailed, PeerUnreachable, PeerSilent, StreamBroken, TransportLost
    │   └── StreamEnded         the other side finished cleanly where more was expected
    ├── Busy                    a peer is full; it says when to ask again
    ├── Stale                   the request belongs to a height, ballot or incarnation that is over
    │   ├── Superseded          another replica has taken the asking one's place
    │   └── VersionRetired      the weights that a session is pinned to are not kept here (any more)
    ├── NotHere                 the asked peer does not hold the thing asked for
    ├── NotServed               the asked peer does not answer such calls (any more)
    ├── StageEmpty              a stage has no live replica
    ├── StorageError            the disk refused
    ├── HardwareTooSmall        this machine cannot hold a stage
    └── DeviceLost              one of several devices of this peer failed, and the peer with it

Every class has a `wire_code` (sent in ABORT frames; the receiver raises the same class) and an
`exit_code` for the command line. Texts say what happened, the evidence, and what to do.
"""

from __future__ import annotations

import math

from shoal.protocol import limits


class ShoalError(Exception):
    """Base of the tree. `wire_code` 1 also stands for errors that must not be described to others."""

    wire_code = 1
    exit_code = 70


class UsageError(ShoalError):
    wire_code, exit_code = 2, 2


class SpecError(ShoalError):
    wire_code, exit_code = 3, 15


class AccessError(ShoalError):
    wire_code, exit_code = 10, 10


class TokenInvalid(AccessError):
    wire_code = 11


class TokenExpired(AccessError):
    wire_code = 12


class TokenRevoked(AccessError):
    wire_code = 13


class ChainInvalid(AccessError):
    wire_code = 14


class BindingInvalid(AccessError):
    wire_code = 15


class WrongRun(AccessError):
    wire_code = 16


class WrongRole(AccessError):
    wire_code = 17


class ProtocolViolation(ShoalError):
    wire_code = 30


class MessageInvalid(ProtocolViolation):
    wire_code = 31


class MessageTooLarge(ProtocolViolation):
    wire_code = 32


class FrameInvalid(ProtocolViolation):
    wire_code = 33


class RecordInvalid(ProtocolViolation):
    wire_code = 34


class NetworkError(ShoalError):
    wire_code, exit_code = 50, 11


class BootstrapFailed(NetworkError):
    wire_code = 51


class PeerUnreachable(NetworkError):
    wire_code = 52


class PeerSilent(NetworkError):
    wire_code = 53


class StreamBroken(NetworkError):
    wire_code = 54


class TransportLost(NetworkError):
    wire_code = 55


class StreamEnded(NetworkError):
    wire_code = 56


class Busy(ShoalError):
    """The peer has no room now. `retry_after_s` crosses the wire in front of the text."""

    wire_code = 70

    def __init__(self, text: str, retry_after_s: float = 0.1) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class Stale(ShoalError):
    wire_code = 71


class VersionRetired(Stale):
    wire_code = 74


class Superseded(Stale):
    wire_code = 75


class NotHere(ShoalError):
    wire_code = 72


class StageEmpty(ShoalError):
    wire_code = 73


class NotServed(ShoalError):
    wire_code = 76


class StorageError(ShoalError):
    wire_code, exit_code = 80, 20


class HardwareTooSmall(ShoalError):
    wire_code, exit_code = 81, 14


class DeviceLost(ShoalError):
    wire_code, exit_code = 82, 21


def _tree(root: type[ShoalError]) -> dict[int, type[ShoalError]]:
    found = {root.wire_code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def to_wire(error: BaseException) -> tuple[int, str]:
    """(code, text) that may leave this machine; errors outside the tree are not described."""
    if isinstance(error, Busy):
        return error.wire_code, f"{error.retry_after_s:.3f}|{error}"
    if isinstance(error, ShoalError) and error.wire_code != ShoalError.wire_code:
        return error.wire_code, str(error)
    return ShoalError.wire_code, "internal error; the peer's own log has the cause"


def from_wire(code: int, text: str) -> ShoalError:
    """The error a remote peer reported, as the class it raised. Unknown codes become ShoalError.

    Of its text what prints: it is shown on terminals, which obey what does not.
    """
    kind = _tree(ShoalError).get(code, ShoalError)
    text = "".join(mark if mark.isprintable() or mark == "\n" else "?" for mark in text)
    if kind is Busy:
        seconds, _, text = text.partition("|")
        return Busy(text, _bounded_s(seconds))
    return kind(text)


def _bounded_s(seconds: str) -> float:
    """A wait that a peer asked for, between the least and the most that anybody heeds."""
    try:
        told_s = float(seconds)
    except ValueError:
        told_s = math.nan
    if math.isnan(told_s):  # it compares with nothing: without this it would pass any bound
        return 1.0
    return min(max(told_s, limits.RETRY_LEAST_S), limits.RETRY_MOST_S)
