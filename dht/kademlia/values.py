"""hivemind's encoding of stored values, read without trust. Used by `call_guard`.

A bucket is a msgpack extension holding [size limit, latest expiry, [[peer id, value, expiry], ...]], a value
the msgpack of a sealed record.
"""

from __future__ import annotations

from typing import Any

import msgpack  # hivemind's own dependency, and its format
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils import MSGPackSerializer

from shoal.protocol import limits
from shoal.protocol.errors import FrameInvalid

PLAIN_VALUE, WHOLE_DICTIONARY = MSGPackSerializer.dumps(None), b""  # hivemind's reserved subkeys
_DICTIONARY_CODE = 0x50  # hivemind's msgpack extension type of a dictionary

Entry = tuple[str, bytes, float]  # peer id, sealed record, Unix time of expiry


def pack(entries: list[Entry]) -> bytes:
    """A dictionary of sealed records, without what a sender may claim of its size and expiry."""
    dictionary = DictionaryDHTValue()
    for peer, sealed, expires_unix_s in entries:
        dictionary.store(peer, MSGPackSerializer.dumps(sealed), expires_unix_s)
    return bytes(MSGPackSerializer.dumps(dictionary))


def unpack(packed: bytes) -> list[Entry]:
    """The entries of a dictionary, at most RECORDS_HELD. Raises FrameInvalid."""
    outer = _loaded(packed)
    is_dictionary = isinstance(outer, msgpack.ExtType) and outer.code == _DICTIONARY_CODE
    match _loaded(outer.data) if is_dictionary else None:
        case [_, _, [*items]]:
            return [_entry(item) for item in items[: limits.RECORDS_HELD]]
        case _:
            raise FrameInvalid("not a dictionary of records")


def peer_of_subkey(subkey: bytes) -> str:
    """Whom a single value is filed under. Raises FrameInvalid."""
    peer = _loaded(subkey) if subkey != PLAIN_VALUE else None
    if not isinstance(peer, str):
        raise FrameInvalid("a value that is not filed under a peer id")
    return peer


def sealed_in(value: bytes) -> bytes:
    """The sealed record of a single value. Raises FrameInvalid."""
    sealed = _loaded(value)
    if not isinstance(sealed, bytes):
        raise FrameInvalid("a value that is not bytes")
    return sealed


def _entry(item: Any) -> Entry:
    match item:
        case [str() as peer, bytes() as value, float() as expires_unix_s]:
            return peer, sealed_in(value), expires_unix_s
        case _:
            raise FrameInvalid("a dictionary entry that is not a record")


def _loaded(data: bytes) -> Any:
    """msgpack without hivemind's extensions, whose decoders recurse as deep as the sender likes."""
    try:
        return msgpack.loads(data, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameInvalid(f"not msgpack ({len(data)} bytes)") from error
