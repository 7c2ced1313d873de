"""Fetching entries from donors, checked link by link, and finding where another chain left the own one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol import limits
from shoal.protocol.errors import MessageInvalid, NotHere, PeerSilent, ShoalError, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.context import Context
from shoal.training.outer.entry import ENTRY_BYTES, Entry, entry_hash, parse
from shoal.training.outer.log import ENTRIES_BYTES, Log
from shoal.training.outer.messages import EntriesRequest, EntryItem
from shoal.training.recovery.download import receive_soon
from shoal.training.recovery.policy import Target

ENTRY_S = 2.0  # for one entry, kilobytes in memory; the only donor may be a leader that stands still
CHAIN_S = 10.0  # for all of them, and as much for each MiB: one that drips must not hold a member up for ever


@dataclass(frozen=True, slots=True)
class Rival:
    """Another chain, from where it left the own one."""

    ancestor_height: int  # the last that both have
    entries: tuple[bytes, ...]  # of the other chain, from there to the target

    @property
    def extends(self) -> bool:
        """Whether there is something to follow at all."""
        return bool(self.entries)


async def fetch_chain(context: Context, height: int, head: bytes, target: Target) -> list[bytes]:
    """The entries from `height` to the target, checked link by link. Raises Stale where they fork."""

    async def ask(donor: PeerId) -> list[bytes]:
        chain = await _entries(context, donor, height + 1, target.height)
        _check_links(donor, chain, head)
        _check_end(donor, chain, head, target)
        return chain

    found, failures = await ask_around(context, target.donors, ask)
    if found is not None:
        return found
    raise _verdict(f"entries {height + 1}-{target.height}", failures, Stale)


async def find_rival(context: Context, log: Log, target: Target) -> Rival:
    """Where the target's chain leaves the own one. Raises NotHere when donors do not go back so far."""
    found, failures = await ask_around(
        context, target.donors, lambda donor: _rival_of(context, donor, log, target)
    )
    if found is not None:
        return found
    raise _verdict(f"where the chain of height {target.height} comes from", failures, NotHere)


async def _rival_of(context: Context, donor: PeerId, log: Log, target: Target) -> Rival:
    """Back from the lower of both heights in growing strides until a head is the same, then forward.

    In shrinking ones once that is beyond what the donor keeps: both sides have to find what both still know,
    or one would compare what was done since and the other totals.
    """
    lowest, back, given = min(log.height, target.height), 0, -1
    refused: int | None = None
    while True:
        height = max(lowest - back, log.oldest_height)
        try:
            chain = await _entries(context, donor, height + 1, target.height)
        except NotHere:
            refused = back
            if refused - given <= 1:
                raise
        else:
            given = back
            previous = parse(chain[0]).previous if chain else target.head
            if previous == log.head_at(height):
                break
            if height == log.oldest_height or refused == given + 1:
                raise NotHere(f"{donor} left this chain below height {height}, the last that both keep")
        back = (2 * given or 1) if refused is None else (given + refused) // 2
    _check_links(donor, chain, previous)
    _check_end(donor, chain, previous, target)
    shared = 0
    while shared < len(chain) and entry_hash(chain[shared]) == log.head_at(height + shared + 1):
        shared += 1
    return Rival(height + shared, tuple(chain[shared:]))


def _verdict(what: str, failures: dict[PeerId, ShoalError], first: type[ShoalError]) -> ShoalError:
    """What donors say counts for more than silence, which says nothing of the chain: then ask again later."""
    for kind in (first, NotHere, Stale):
        if any(isinstance(error, kind) for error in failures.values()):
            return kind(f"{what}: {reasons(failures)}")
    return PeerSilent(f"{what}: {reasons(failures)}")


async def fetch_entry(context: Context, donor: PeerId, height: int) -> Entry:
    """One entry of a donor's chain. Raises NotHere, and what the transport raises."""
    return parse((await _entries(context, donor, height, height))[0])


async def _entries(context: Context, donor: PeerId, first: int, last: int) -> list[bytes]:
    chain: list[bytes] = []
    if first > last:
        return chain
    # What a replica keeps at most (`Log.prune`): how many there are is only what somebody tells.
    room = ENTRIES_BYTES + (context.spec.outer.snapshot_every + 1) * ENTRY_BYTES
    loop = asyncio.get_running_loop()
    async with context.transport.open(donor, context.method("entries"), Channel.BULK) as stream:
        until_s = loop.time() + CHAIN_S
        await stream.send(EntriesRequest(first, last))
        await stream.end()
        for expected in range(first, last + 1):
            data = bytes((await receive_soon(stream, EntryItem, ENTRY_BYTES, ENTRY_S)).payload)
            if parse(data).height != expected:
                raise MessageInvalid(f"entry {parse(data).height} of {donor} where {expected} was due")
            room -= len(data)
            until_s += CHAIN_S * len(data) / limits.MIB
            if expected < last and loop.time() > until_s:
                raise PeerSilent(f"{donor} gives entries too slowly: {len(chain) + 1} of {last + 1 - first}")
            if room < 0:
                raise MessageInvalid(f"{donor} sends more entries than a replica keeps")
            chain.append(data)
    return chain


def _check_links(donor: PeerId, chain: Sequence[bytes], head: bytes) -> None:
    for data in chain:
        entry = parse(data)
        if entry.previous != head:
            raise Stale(f"entry {entry.height} of {donor} does not follow head {head.hex()[:8]}: a fork")
        head = entry_hash(data)


def _check_end(donor: PeerId, chain: Sequence[bytes], head: bytes, target: Target) -> None:
    if (entry_hash(chain[-1]) if chain else head) != target.head:
        raise MessageInvalid(f"the chain of {donor} does not end at the head that members announce")
