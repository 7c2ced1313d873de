"""The contact book: how to dial the peers this one has heard of.

Filled from signed records (directory, rosters); read by the transport when it dials. Bounded: the contact
least recently learned or asked for is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict

from shoal.protocol import limits
from shoal.protocol.admission import Membership
from shoal.protocol.errors import BindingInvalid
from shoal.protocol.identity import Contact, PeerId


class ContactBook:
    """The newest contact of each peer.

    With a membership, every contact is verified when it is learned. Without, the caller vouches for them
    (records are verified already); the transport verifies once more before it dials.
    """

    def __init__(self, membership: Membership | None = None, capacity: int = limits.RECORDS_HELD) -> None:
        self._membership = membership
        self._capacity = capacity
        self._contacts: OrderedDict[PeerId, Contact] = OrderedDict()

    def learn(self, contact: Contact) -> None:
        """Keep this contact instead of an older one; the caller feeds them in the order of the records.

        Raises what `Membership.verify` raises, and BindingInvalid for another peer's chain.
        """
        if self._membership is not None:
            verified = self._membership.verify(contact.chain)
            if verified.peer != contact.peer:
                raise BindingInvalid(f"{verified.peer}'s certificates came as {contact.peer}'s")
        self._contacts[contact.peer] = contact
        self._contacts.move_to_end(contact.peer)
        if len(self._contacts) > self._capacity:
            self._contacts.popitem(last=False)

    def get(self, peer: PeerId) -> Contact | None:
        """How to dial `peer`, if known."""
        contact = self._contacts.get(peer)
        if contact is not None:
            self._contacts.move_to_end(peer)
        return contact

    def forget(self, peer: PeerId) -> None:
        """Drop a contact (a revoked peer)."""
        self._contacts.pop(peer, None)

    def __len__(self) -> int:
        return len(self._contacts)
