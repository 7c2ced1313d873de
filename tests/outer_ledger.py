"""A scalar ledger: weights that count inner steps, so that every step can be told where it is.

In each part of the stage every process has a value of its own, and an inner step adds one to it, nothing
else. What a round brought into the agreed state is read off the momentum, what waits in a process's weights
off `w - a`. Both together must be the steps it made: none lost, none twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shoal.training.outer.entry import SKIP, Entry, entry_hash, parse, seats_in
from shoal.training.outer.log import genesis_state
from shoal.training.outer.parts import Part, cut

if TYPE_CHECKING:
    from outer_world import Node, World

Process = tuple[str, int]  # peer, incarnation
Counts = dict[tuple[str, int, int], float]  # process and part's index -> steps
_NOTHING = torch.empty(0)
TOLERANCE = 0.02  # steps; fp32 rounding over some hundred entries stays far below


@dataclass
class Account:
    """What the agreed state at a head holds."""

    inside: Counts = field(default_factory=dict)
    reentered: int = 0  # entries of lost chains
    written_off: int = 0  # their parts that nobody could deliver


class Ledger:
    """Of one world of one stage."""

    def __init__(self, world: World) -> None:
        self.world = world
        outer = world.spec.outer
        block = world.spec.compression.block
        self.fragments = cut(world.genesis.numel(), outer.part_bytes, block, outer.fragments)
        self.exact = world.spec.compression.contribution == world.spec.compression.published == "float32"
        self.archive: dict[bytes, bytes] = {}
        genesis = genesis_state(world.spec.run_id(), 0).head
        self._accounts: dict[bytes, Account] = {genesis: Account()}
        self._held: dict[bytes, Counts] = {}  # entry -> what its round brought in
        self._columns: dict[Process, int] = {}
        self._changes: dict[Process, torch.Tensor] = {}
        self._before: dict[Process, tuple[bytes, torch.Tensor, torch.Tensor]] = {}

    def parts(self) -> Iterator[Part]:
        """Of the whole stage."""
        for fragment in self.fragments:
            yield from fragment.parts

    def column(self, peer: str, incarnation: int) -> int:
        """The value that counts a process's steps, from a part's first."""
        column = self._columns.setdefault((peer, incarnation), len(self._columns))
        assert column < min(part.count for part in self.parts()), "more processes than values in a part"
        return column

    def step(self, node: Node) -> torch.Tensor:
        """The change of an inner step, the same each time."""
        process = (node.name, node.incarnation)
        if process not in self._changes:
            change = self._changes[process] = torch.zeros(self.world.genesis.numel())
            change[[part.start + self.column(*process) for part in self.parts()]] = 1.0
        return self._changes[process]

    # -- what entries bring in

    def note(self, node: Node, data: bytes) -> None:
        """A node has applied an entry."""
        entry, head = parse(data), entry_hash(data)
        key = (node.name, node.incarnation)
        previous, anchor, momentum = self._before.get(key, (b"", _NOTHING, _NOTHING))
        self.archive[head] = data
        if self.exact and not entry.lost and head not in self._held and previous == entry.previous:
            self._held[head] = self._counts(entry, anchor, momentum, node)
        self.watch(node)

    def watch(self, node: Node) -> None:
        """Remember a node's state, from which its next entry goes on."""
        outer = node.outer
        self._before[node.name, node.incarnation] = (outer.head, outer.anchor, outer.momentum)

    def _counts(self, entry: Entry, anchor: torch.Tensor, momentum: torch.Tensor, node: Node) -> Counts:
        outer = self.world.spec.outer
        found: Counts = {}
        for number, part in enumerate(self.fragments[entry.fragment].parts):
            rows = [row for row in entry.contributors if row.seat in seats_in(entry.listed_in(number))]
            if outer.momentum:
                mean = node.outer.momentum[part.span].double() - outer.momentum * momentum[part.span].double()
            else:
                mean = (
                    anchor[part.span].double() - node.outer.anchor[part.span].double()
                ) / outer.learning_rate
            tokens = sum(row.tokens for row in rows)
            for row in rows:
                seat = entry.roster[row.seat]
                column = self.column(seat.peer, seat.incarnation)
                share = row.clip * row.tokens / tokens
                found[seat.peer, seat.incarnation, part.index] = -float(mean[column]) / share
        return found

    def chain(self, head: bytes) -> list[Entry]:
        """All entries up to a head."""
        found = []
        while head in self.archive:
            found.append(parse(self.archive[head]))
            head = found[-1].previous
        return found[::-1]

    def account(self, head: bytes) -> Account:
        """Of the chain that ends at a head."""
        path = []
        while head not in self._accounts:
            path.append(head)
            head = parse(self.archive[head]).previous
        for head_after in reversed(path):
            self._accounts[head_after] = self._after(self._accounts[head], head_after)
            head = head_after
        return self._accounts[head]

    def _after(self, before: Account, head: bytes) -> Account:
        entry = parse(self.archive[head])
        after = Account(dict(before.inside), before.reentered, before.written_off)
        held = self._held.get(head, {})
        if entry.lost:
            parts = self.fragments[entry.fragment].parts
            lost = entry.source()
            skipped = {part.index for n, part in enumerate(parts) if entry.digest(n) == SKIP}
            after.written_off += sum(
                entry.digest(n) == SKIP and lost.digest(n) != SKIP for n in range(len(parts))
            )
            after.reentered += 1
            whole = self._held.get(entry_hash(entry.lost), {})
            held = {key: count for key, count in whole.items() if key[2] not in skipped}
        for key, count in held.items():
            after.inside[key] = after.inside.get(key, 0.0) + count
        return after

    # -- proofs

    def check(self, node: Node) -> None:
        """P4 for a live process, in every part: what the log holds and what waits is what was made."""
        account = self.account(node.outer.head)
        made = node.weights.inner_steps
        column = self.column(node.name, node.incarnation)
        for part in self.parts():
            at = part.start + column
            waits = float(node.weights.weights[at].double() - node.outer.anchor[at].double())
            inside = account.inside.get((node.name, node.incarnation, part.index), 0.0)
            where = f"{node.name[8:11]}, part {part.index}: {waits:.3f} steps wait"
            assert abs(waits - round(waits)) < TOLERANCE, f"{where}: not a whole number"
            assert -TOLERANCE < waits < made + TOLERANCE, f"{where} of {made}"
            if self.exact:
                assert abs(inside + waits - made) < TOLERANCE, f"{where} and {inside:.3f} are in, of {made}"

    def waiting(self, node: Node) -> float:
        """Steps of a process that wait in the part that holds most."""
        ahead = node.weights.weights.double() - node.outer.anchor.double()
        column = self.column(node.name, node.incarnation)
        return max(float(ahead[part.start + column]) for part in self.parts())

    def check_anchor(self, node: Node) -> None:
        """The agreed weights against fp64 arithmetic on what the entries brought in."""
        outer = self.world.spec.outer
        anchor = self.world.genesis.double()
        momentum = torch.zeros_like(anchor)
        for entry in self.chain(node.outer.head):
            source = entry.source()
            held = self._held[entry_hash(entry.lost or entry.encode())]
            for number, part in enumerate(self.fragments[entry.fragment].parts):
                if entry.digest(number) == SKIP:
                    continue
                mean = self._mean(source, number, part, held)
                if entry.lost:
                    anchor[part.span] -= outer.learning_rate * entry.scale * mean
                    continue
                velocity = momentum[part.span].mul_(outer.momentum).add_(mean)
                change = mean + outer.momentum * velocity if outer.nesterov else velocity
                anchor[part.span] -= outer.learning_rate * (change if outer.momentum else mean)
        torch.testing.assert_close(node.outer.anchor.double(), anchor, rtol=0.0, atol=TOLERANCE)

    def _mean(self, entry: Entry, number: int, part: Part, held: Counts) -> torch.Tensor:
        rows = [row for row in entry.contributors if row.seat in seats_in(entry.listed_in(number))]
        tokens = sum(row.tokens for row in rows)
        mean = torch.zeros(part.count, dtype=torch.float64)
        for row in rows:
            seat = entry.roster[row.seat]
            count = held[seat.peer, seat.incarnation, part.index]
            mean[self.column(seat.peer, seat.incarnation)] -= row.clip * row.tokens / tokens * round(count)
        return mean
