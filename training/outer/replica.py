"""Replica: the agreed state of a stage at one peer: anchors, outer momentum, log, and recent payloads.

One method changes it, `apply`, in height order. Tensors are never changed in place once they are here, so
readers (serving, snapshots, donors) keep what they took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from shoal.protocol.errors import NotHere
from shoal.protocol.identity import PeerId
from shoal.training.outer.apply import Applied, OuterStep, part_state, tensors_digest
from shoal.training.outer.codecs import codecs_of
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import SKIP, Entry, parse
from shoal.training.outer.local import LocalWeights, Rebase
from shoal.training.outer.log import Log, state_root
from shoal.training.outer.lost import Lost
from shoal.training.outer.offered import Offered
from shoal.training.outer.parts import Part
from shoal.training.outer.payloads import Payloads
from shoal.training.outer.reduce import Published
from shoal.training.outer.residuals import Residuals
from shoal.training.outer.snapshot import Snapshot

_SHIFT_MOST = 16.0  # times the largest weight: leaves 20 of fp32's 24 bits to a step


class Replica:
    """The replicated state machine of one stage."""

    def __init__(self, context: Context, snapshot: Snapshot) -> None:
        self._context = context
        self.log = Log(snapshot.state, context.fragments)
        self.payloads = Payloads(context.payload_budget_bytes)
        self.residuals = Residuals(context.size)
        self.lost = Lost()
        self.offered = Offered(context.me, context.incarnation, context.payload_budget_bytes)
        self.applied: list[Callable[[Entry, bytes, Mapping[int, Published]], None]] = []
        self.state_root = snapshot.state_root
        self._anchors = [snapshot.anchor[fragment.span] for fragment in context.fragments]
        self._momenta = [snapshot.momentum[fragment.span] for fragment in context.fragments]
        self._digests: list[list[bytes]] = [[] for _ in context.fragments]  # of each part, once needed
        self._whole: tuple[int, torch.Tensor, torch.Tensor] = (
            snapshot.height,
            snapshot.anchor,
            snapshot.momentum,
        )

    @property
    def anchor(self) -> torch.Tensor:
        """Of the whole stage [size] fp32 CPU; copied together once a height if it has fragments."""
        return self._joined()[1]

    @property
    def momentum(self) -> torch.Tensor:
        """Of the whole stage [size] fp32 CPU."""
        return self._joined()[2]

    def anchor_of(self, fragment: int) -> torch.Tensor:
        """Of one fragment."""
        return self._anchors[fragment]

    def _joined(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        if self._whole[0] != self.log.height:
            self._whole = (self.log.height, *_join(self._anchors, self._momenta))
        return self._whole

    async def whole(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Height, anchor and momentum of the whole stage, put together off the loop."""
        if self._whole[0] == self.log.height:
            return self._whole
        height, anchors, momenta = self.log.height, list(self._anchors), list(self._momenta)
        joined = (height, *await self._context.offload(_join, anchors, momenta))
        if all(now is then for now, then in zip(self._anchors, anchors, strict=True)):
            self._whole = joined  # neither entry nor repair meanwhile
        return joined

    async def _joined_ahead(
        self, entry: Entry, result: Applied
    ) -> tuple[int, torch.Tensor, torch.Tensor] | None:
        """What `whole` will be after an entry at which snapshots are taken: gigabytes, so not on the loop."""
        if entry.height % self._context.spec.outer.snapshot_every:
            return None
        anchors, momenta = list(self._anchors), list(self._momenta)
        anchors[entry.fragment], momenta[entry.fragment] = result.anchor, result.momentum
        return (entry.height, *await self._context.offload(_join, anchors, momenta))

    async def apply(
        self,
        data: bytes,
        published: Mapping[int, Published],
        local: LocalWeights,
        contribution: Contribution | None,
        step: OuterStep | None = None,
        reached: frozenset[PeerId] = frozenset(),
    ) -> Entry:
        """Take the next entry in: outer step, rebase of local weights, residuals, log. All or nothing.

        `contribution` is what this process offered at that height, if it did, `step` what its round has done
        already, `reached` who may have got some of the contribution. Raises Stale or MessageInvalid from the
        log's rules, NotHere for a part that is missing.
        """
        entry = parse(data)
        self.log.check(entry)
        means = self._means(entry, published)
        fragment = self._context.fragments[entry.fragment]
        seat = entry.seat_of(self._context.me, self._context.incarnation)
        row = entry.row_of(seat) if seat is not None else None
        listed = row is not None and contribution is not None and contribution.sent.inner_step == row.to_step
        step = step or self.begin_step(entry)
        result = await step.finish(entry, means, contribution if listed else None)
        await self.digests(but=fragment.index)
        ahead = await self._joined_ahead(entry, result)
        await local.rebase([*result.changes, *self._settle(entry)])
        hashed = await step.digests()
        quorum = frozenset(self.log.quorum)  # those of them who are missing now may hold another outcome
        self.log.append(data)
        self._anchors[fragment.index], self._momenta[fragment.index] = result.anchor, result.momentum
        self._digests[fragment.index] = hashed
        self._whole = ahead or self._whole
        self.residuals.retire_contributed(result.remainders)
        if not entry.lost:
            now_s = asyncio.get_running_loop().time()
            self.offered.note(entry, contribution if reached else None, reached | quorum, now_s)
        self.lost.note(entry)
        digests = [digest for fragment in self._digests for digest in fragment]
        self.state_root = state_root(tensors_digest(digests), self.log.state())
        self.payloads.keep(entry.height, means)
        for callback in self.applied:
            callback(entry, data, means)
        return entry

    def begin_step(self, entry: Entry) -> OuterStep:
        """The outer step of an entry, or of the draft of one."""
        fragment = self._context.fragments[entry.fragment]
        anchor, momentum = self._anchors[fragment.index], self._momenta[fragment.index]
        scale = entry.scale if entry.lost else None
        codecs, digests = codecs_of(entry, len(fragment.parts)), self._digests[fragment.index]
        return OuterStep(self._context, fragment, codecs, anchor, momentum, digests, scale)

    def _settle(self, entry: Entry) -> list[Rebase]:
        """Of a re-entry: what of this process's part in the lost round is in the agreed state from now on."""
        if not entry.lost:
            return []
        source = entry.source()
        mine, here = self.offered.lists(source), self.lost.after(source.previous)
        delivered = {part for part in mine if entry.digest(part) != SKIP}
        # By another entry: of this round, and settled then, or of a later one that carried these steps on.
        before = self.lost.delivered_to(source.previous, (self._context.me, self._context.incarnation))
        return self.offered.amend(source.previous, (mine & here.promised) - before if here else (), delivered)

    def pass_by(self, entry: Entry) -> list[Rebase]:
        """Of an entry that is jumped over: what it means for earlier contributions, and for lost entries."""
        changes = self._settle(entry)
        self.lost.note(entry)
        return changes

    async def sift(self, local: LocalWeights) -> None:
        """Let go of lost entries that are back, and take back the own part in those that cannot be."""
        for lost in self.lost.sift(self.log):
            me = (self._context.me, self._context.incarnation)
            missing = self.offered.lists(lost.entry) & lost.promised - lost.delivered_to(me)
            changes = self.offered.amend(lost.entry.previous, missing, ())
            self._context.event("lost-for-good", {"height": lost.entry.height, "taken_back": len(changes)})
            await local.rebase(changes)

    def _means(self, entry: Entry, published: Mapping[int, Published]) -> dict[int, Published]:
        means: dict[int, Published] = {}
        for part in range(entry.parts):
            digest = entry.digest(part)
            if digest == SKIP:
                continue
            found = published.get(part)
            if found is None or found.digest != digest:
                raise NotHere(f"entry {entry.height}: part {part} ({digest.hex()[:8]}) is not here")
            means[part] = found
        return means

    async def digests(self, but: int | None = None) -> list[bytes]:
        """Of each part of the agreed state as it is now; hashed if not known, `but` one fragment's."""
        found, anchors, momenta = list(self._digests), list(self._anchors), list(self._momenta)
        for index, known in enumerate(found):
            if not known and index != but:
                anchor, momentum = anchors[index], momenta[index]
                found[index] = await self._context.offload(self._hash, index, anchor, momentum)
                if self._anchors[index] is anchor and self._momenta[index] is momentum:
                    self._digests[index] = found[index]  # no entry and no jump meanwhile
        return [digest for fragment in found for digest in fragment]

    async def hash_anew(self) -> list[bytes]:
        """Digest of each part as it is in memory now, whatever it was when it was agreed."""
        states = enumerate(zip(self._anchors, self._momenta, strict=True))
        hashed = [self._context.offload(self._hash, index, *state) for index, state in states]
        return [digest for fragment in await asyncio.gather(*hashed) for digest in fragment]

    def _hash(self, index: int, anchor: torch.Tensor, momentum: torch.Tensor) -> list[bytes]:
        fragment = self._context.fragments[index]
        spans = [fragment.within(part) for part in fragment.parts]
        return [part_state(anchor[span], momentum[span]) for span in spans]

    async def adopt(
        self,
        other: Replica,
        local: LocalWeights,
        contribution: Contribution | None = None,
        listed: Collection[int] = (),
        settled: Sequence[Rebase] = (),
    ) -> None:
        """Jump to another, verified state: w ← w + (new − a), with s for a in `listed` parts.

        Those are parts (by index) whose state here holds `contribution`, of which this peer saw no COMMIT.
        `settled` is what else a switch of chains means for local weights.
        """
        changes = list(settled)
        remainders: dict[int, torch.Tensor | None] = {}
        for fragment in self._context.fragments:
            old, new = self._anchors[fragment.index], other._anchors[fragment.index]
            for part in fragment.parts:
                within = fragment.within(part)
                base = old[within]
                if contribution is not None and part.index in listed:
                    base = contribution.sent.weights[within]
                    remainders[part.index] = contribution.remainder(part)
                changes.append(Rebase(part.start, base, new[within]))
        await local.rebase(changes)
        self._anchors, self._momenta, self._digests = other._anchors, other._momenta, other._digests
        self._whole, self.state_root = other._whole, other.state_root
        self.log, self.payloads = other.log, other.payloads
        self.residuals.retire_contributed(remainders)

    def part_state(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchor and momentum of one part."""
        fragment = next(fragment for fragment in self._context.fragments if part in fragment.parts)
        span = fragment.within(part)
        return self._anchors[fragment.index][span], self._momenta[fragment.index][span]

    async def repair(
        self,
        state: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        digests: Sequence[bytes],
        local: LocalWeights,
    ) -> None:
        """Put parts (by index) right at the same head: w ← w + (right − wrong). The caller has verified them.

        Where that is beyond fp32, the steps since in that part have gone already: it starts from what is
        right. `digests` are those of all parts of the right state.
        """
        anchors, momenta, changes, spoilt = await self._context.offload(self._patched, state)
        whole = await self._context.offload(_join, anchors, momenta)
        await local.rebase(changes)
        self.residuals.retire_contributed(spoilt)
        taken = iter(digests)
        self._digests = [[next(taken) for _ in fragment.parts] for fragment in self._context.fragments]
        self._anchors, self._momenta = anchors, momenta
        self._whole = (self.log.height, *whole)
        self.state_root = state_root(tensors_digest(digests), self.log.state())

    def _patched(self, state: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Any, ...]:
        """Anchors and momenta with these parts; what follows for local weights and for residuals."""
        changes: list[Rebase] = []
        spoilt: dict[int, torch.Tensor | None] = {}
        anchors, momenta = list(self._anchors), list(self._momenta)
        for index, fragment in enumerate(self._context.fragments):
            wrong = [part for part in fragment.parts if part.index in state]
            if wrong:
                anchors[index], momenta[index] = anchors[index].clone(), momenta[index].clone()
            for part in wrong:
                span = fragment.within(part)
                anchors[index][span], momenta[index][span] = state[part.index]
                old, right = self._anchors[index][span], anchors[index][span]
                tells = bool((old - right).abs().max() <= _SHIFT_MOST * right.abs().max())
                changes.append(Rebase(part.start, old, right, None if tells else 0.0))
                if not tells:
                    spoilt[part.index] = None
        return anchors, momenta, changes, spoilt

    def prune(self, snapshot_height: int) -> None:
        """Let go of what is older than the last snapshot and over budget."""
        self.payloads.prune(snapshot_height)
        self.log.prune(snapshot_height)


def _join(
    anchors: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(anchors) == 1:
        return anchors[0], momenta[0]
    return torch.cat(list(anchors)), torch.cat(list(momenta))
