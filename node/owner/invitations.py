"""The owner's peer keeps what new tokens carry up to date, and hands the first invitation out."""

from __future__ import annotations

import asyncio
import time

from shoal.node.events import Events
from shoal.node.owner.home import OwnerHome
from shoal.node.presence import Presence
from shoal.protocol.errors import StorageError

_ADDRESSES_EVERY_S = 10.0
_FIRST_LOOK_S = 0.2
_OWN_IN_TOKEN, _OTHERS_IN_TOKEN = 5, 3


async def keep_addresses(presence: Presence, owner: OwnerHome, events: Events) -> None:
    """Until cancelled."""
    known: tuple[str, ...] = ()
    refused = ""  # by the disk
    while True:
        found = presence.directory.bootstrap_addresses()[:_OWN_IN_TOKEN]
        if found:  # P6: whoever has a token can join while any of these is there
            found = (*found, *sorted(presence.directory.met_addresses(_OTHERS_IN_TOKEN)))
        if found and found != known:
            try:
                await asyncio.to_thread(owner.keep_addresses, found)
                if not known:
                    await _invite(owner, events)
                known, refused = found, ""
            except StorageError as error:
                if refused != str(error):
                    text = f"new tokens will not name all addresses of now, all else goes on: {error}"
                    events("disk-refused", {"why": str(error), "text": text})
                refused = str(error)
        await asyncio.sleep(_ADDRESSES_EVERY_S if known or refused else _FIRST_LOOK_S)


async def _invite(owner: OwnerHome, events: Events) -> None:
    path, text = await asyncio.to_thread(owner.invitation, time.time())
    events(
        "invitation",
        {
            "token_file": str(path),
            "text": f"to join from another terminal or machine:\n\n  shoal join {text}\n\n"
            f"(the same token is in {path}; one volunteer, one token: shoal token create)",
        },
    )
