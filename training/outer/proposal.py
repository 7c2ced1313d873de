"""What a leader proposes: the offer that PREPARE carries, and the draft that GO carries. Pure.

A plain round synchronises the fragment that is due; a re-entry brings back what a lost chain had agreed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from shoal.protocol.identity import PeerId
from shoal.training.outer.codecs import round_codecs
from shoal.training.outer.context import Context
from shoal.training.outer.entry import Contributor, Entry, Seat
from shoal.training.outer.log import Log
from shoal.training.outer.lost import LostEntry
from shoal.training.outer.messages import Answer
from shoal.training.outer.policy import (
    GroupMember,
    clip_factors,
    counted_tokens,
    may_leave,
    slowest_uplink,
)


def plain_offer(
    context: Context,
    log: Log,
    group: Sequence[GroupMember],
    ballot: int,
    first_stage_head: bytes,
    mix: bytes,
) -> Entry:
    """What a plain round at the next height begins with: nobody contributes to it yet."""
    roster = tuple(
        Seat(member.peer, member.incarnation, member.uplink)
        for member in sorted(group, key=lambda member: member.peer)
    )
    contribution, published = round_codecs(
        context.spec.compression, log.height + 1, slowest_uplink([seat.uplink for seat in roster])
    )
    return Entry(
        stage=context.stage,
        height=log.height + 1,
        previous=log.head,
        ballot=ballot,
        leader=context.me,
        revision=max(context.amended.revision, log.revision),
        fragment=log.next_fragment.index,
        roster=roster,
        contributors=(),
        first_stage_head=first_stage_head,
        contribution=contribution,
        published=published,
        mix=mix,
    )


def reentry_offer(offer: Entry, lost: LostEntry) -> Entry:
    """The same for a lost entry that is to come back: fragment and codecs are those of its round."""
    return dataclasses.replace(
        offer,
        fragment=lost.entry.fragment,
        contribution=lost.entry.contribution,
        published=lost.entry.published,
        mix=lost.entry.mix,
        lost=lost.data,
        scale=lost.scale,
    )


def with_present(roster: Sequence[Seat], answers: Mapping[PeerId, Answer]) -> tuple[Seat, ...]:
    """The roster, with those present who answered, in the incarnation that they say."""
    return tuple(_taken(seat, answers.get(PeerId(seat.peer))) for seat in roster)


def _taken(seat: Seat, answer: Answer | None) -> Seat:
    if answer is None:
        return dataclasses.replace(seat, present=False)
    return dataclasses.replace(seat, present=True, incarnation=answer.incarnation or seat.incarnation)


def draft_of(
    offer: Entry,
    answers: Mapping[PeerId, Answer],
    like: Entry,
    log: Log,
    minimum_replicas: int,
    round_tokens: int,
) -> Entry:
    """Everybody who answered is present; who has tokens contributes, in the codecs of `like`.

    `round_tokens`: of one member's share; nobody counts for much more than the whole round. Whose steps do
    not go on from those in the log is not listed: all would refuse the entry. Nobody contributes where nobody
    has made a step.
    """
    roster = with_present(offer.roster, answers)
    given = [(i, answers[seat.peer]) for i, seat in enumerate(roster) if seat.peer in answers]
    given = [(i, answer) for i, answer in given if answer.tokens and answer.to_step > answer.from_step]
    ends = [log.end_of(PeerId(seat.peer), seat.incarnation, offer.fragment)[0] for seat in roster]
    given = [(i, answer) for i, answer in given if answer.from_step == ends[i]]
    tokens = counted_tokens([answer.tokens for _, answer in given], len(answers), round_tokens)
    clips = clip_factors([answer.norm for _, answer in given], tokens)
    rows = tuple(
        Contributor(i, a.from_step, a.to_step, count, a.norm, clip, a.positions)
        for (i, a), count, clip in zip(given, tokens, clips, strict=True)
    )
    asking = [peer for peer, answer in answers.items() if answer.leaves]
    return dataclasses.replace(
        offer,
        roster=roster,
        contributors=rows,
        leaving=may_leave(asking, list(answers), log.leaving, minimum_replicas),
        contribution=like.contribution,
        published=like.published,
        mix=like.mix,
    )
