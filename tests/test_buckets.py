"""Where records are filed, and which of them a look reads: a swarm of any size costs its peers the same."""

from __future__ import annotations

import random

import pytest

from shoal.dht.buckets import (
    BITS_MOST,
    EVERYBODY,
    FULL,
    LOOK_RECORDS,
    NOWHERE,
    ROOT,
    Bucket,
    Spot,
    Survey,
    estimate,
    path,
)

RUN = bytes(32)


class Bookcase:
    """Buckets as their holders keep them, and peers that publish, look and come and go."""

    def __init__(self, seed: int, peers: int, stages: int) -> None:
        self.rng = random.Random(seed)
        self.held: dict[Bucket, dict[str, tuple[int, int]]] = {}  # until the round they last till
        self.stage_of: dict[str, int] = {}
        self.surveys: dict[str, Survey] = {}
        self.now = 0
        self.stages = stages
        self.read = self.stored = 0
        for _ in range(peers):
            self.join(self.rng.randrange(stages))

    def join(self, stage: int) -> str:
        name = f"peer {self.rng.getrandbits(60)}"
        self.stage_of[name] = stage
        self.surveys[name] = Survey(Spot.of(name, RUN), self.rng)
        return name

    def show(self, bucket: Bucket) -> dict[str, tuple[int, int]]:
        held = self.held.get(bucket, {})
        return {name: one for name, one in held.items() if one[1] > self.now}

    def look(self, name: str, widely: bool = False) -> set[str]:
        found: set[str] = set()
        survey, stages = self.surveys[name], () if widely else (self.stage_of[name],)
        for bucket in survey.look(stages, widely=widely):
            self.see(survey, bucket)
            shown = self.show(bucket)
            self.read += len(shown)
            found.update(shown)
        return found

    def found_of_its_stage(self, name: str, looks: int) -> float:
        """The share of the living of its own stage that a peer has seen after so many looks."""
        found = set[str]().union(*(self.look(name) for _ in range(looks)))
        mine = {other for other in self.surveys if self.stage_of[other] == self.stage_of[name]}
        return len(found & mine) / len(mine)

    def see(self, survey: Survey, bucket: Bucket) -> None:
        shown = self.show(bucket)
        survey.saw(bucket, [rank for rank, _ in shown.values()], {self.stage_of[name] for name in shown})

    def publish(self, name: str) -> None:
        survey, tried = self.surveys[name], set[Bucket]()
        while new := [bucket for bucket in survey.filed((self.stage_of[name],)) if bucket not in tried]:
            tried.update(new)
            if [self.store(bucket, name) for bucket in new][-1]:
                break
            self.see(survey, new[-1])

    def store(self, bucket: Bucket, name: str) -> bool:
        assert bucket in set(path((self.stage_of[name],), Spot.of(name, RUN)))
        held, rank = self.show(bucket), Spot.of(name, RUN).rank
        if name not in held and len(held) >= FULL:
            highest = max(held, key=lambda one: held[one][0])
            if rank > held[highest][0]:
                return False
            del held[highest]
        held[name] = rank, self.now + 3
        self.held[bucket] = held
        self.stored += 1
        return True

    def round(self, looks: int = 4) -> None:
        """A third of a record's life."""
        for name in self.rng.sample(sorted(self.surveys), len(self.surveys)):
            self.publish(name)
            for _ in range(looks):
                self.look(name)
        self.now += 1


def test_a_small_swarm_reads_everything_from_one_bucket() -> None:
    swarm = Bookcase(1, FULL - 1, 4)
    for _ in range(3):
        swarm.round(looks=1)
    assert all(swarm.look(name) == set(swarm.surveys) for name in list(swarm.surveys)[:5])
    assert all(survey.sizes() == {} for survey in swarm.surveys.values())


@pytest.mark.parametrize("peers", [100, 300, 1500])
def test_what_a_peer_stores_and_reads_does_not_grow_with_the_swarm(peers: int) -> None:
    swarm = Bookcase(2, peers, 12)
    for _ in range(3):
        swarm.round(looks=2)
    swarm.read = swarm.stored = 0
    swarm.round(looks=2)
    assert swarm.stored / peers < 6
    a_look = swarm.read / peers / 2  # the more it read, the longer the next one waits
    assert LOOK_RECORDS * 0.8 < a_look < LOOK_RECORDS * 1.6


def test_every_peer_can_be_found_and_sizes_are_about_right() -> None:
    swarm = Bookcase(3, 750, 3)
    for _ in range(3):
        swarm.round(looks=2)
    reader = next(iter(swarm.surveys))
    assert swarm.found_of_its_stage(reader, looks=300) >= 0.98
    for name in list(swarm.surveys)[:20]:
        sizes = swarm.surveys[name].sizes()
        assert sizes[swarm.stage_of[name]] == pytest.approx(250, rel=0.5)


def test_a_stage_of_one_replica_in_a_crowd_is_seen_by_its_neighbours_and_by_seekers() -> None:
    swarm = Bookcase(4, 1000, 5)
    lonely = swarm.join(5)
    for _ in range(3):
        swarm.round(looks=2)
    for name in [name for name, stage in swarm.stage_of.items() if stage == 4][:20]:
        assert any(lonely in swarm.look(name) for _ in range(2))
    for _ in range(20):
        seeker = swarm.join(NOWHERE)
        met = [swarm.look(seeker, widely=True) for _ in range(3)]
        assert lonely in set().union(*met)
        sizes = swarm.surveys[seeker].sizes()
        assert sizes.keys() == set(range(6))
        assert sizes[5] == 1


def test_a_crowd_that_shrinks_reads_everything_again() -> None:
    swarm = Bookcase(5, 400, 4)
    for _ in range(3):
        swarm.round(looks=2)
    for name in list(swarm.surveys)[20:]:
        del swarm.surveys[name]
    for _ in range(8):
        swarm.round()
    assert all(swarm.look(name) == set(swarm.surveys) for name in swarm.surveys)


@pytest.mark.parametrize("count", [5, FULL - 1, 50, 500, 5_000])
def test_how_many_there_are_is_told_by_the_lowest_ranks(count: int) -> None:
    rng = random.Random(count)
    errors = []
    for _ in range(30):
        ranks = sorted(rng.getrandbits(64) for _ in range(count))[:FULL]
        errors.append(estimate(ranks) / count - 1)
    assert abs(sum(errors) / len(errors)) < 0.15
    assert max(map(abs, errors)) < 1.0


def test_a_bucket_of_hostile_peers_hides_nobody_and_changes_no_size_for_long() -> None:
    """FULL peers with the lowest ranks in everybody's bucket: the swarm looks huge, and is read as before."""
    swarm = Bookcase(6, 300, 3)
    for _ in range(3):
        swarm.round(looks=2)
    swarm.held[ROOT] = {f"eve {n}": (n, 99) for n in range(FULL)}
    swarm.stage_of |= {f"eve {n}": 2 for n in range(FULL)}
    for _ in range(3):
        swarm.round(looks=3)
    reader = next(iter(swarm.surveys))
    assert swarm.found_of_its_stage(reader, looks=150) >= 0.95
    assert swarm.surveys[reader].sizes()[swarm.stage_of[reader]] < 300


@pytest.mark.parametrize("tries", [20, 26])
def test_ids_chosen_for_their_low_ranks_hide_no_stage_from_newcomers(tries: int) -> None:
    """The FULL lowest of 2**tries ids, in the buckets of everybody and of one stage."""
    swarm = Bookcase(6, 300, 3)
    for _ in range(3):
        swarm.round(looks=2)
    mine = {name for name in swarm.surveys if swarm.stage_of[name] == 2}
    eves = {f"eve {n}": ((n + 1) << (64 - tries), 99) for n in range(FULL)}
    swarm.stage_of |= dict.fromkeys(eves, 2)
    for _ in range(4):
        swarm.held[ROOT] = swarm.held[Bucket(2)] = dict(eves)
        swarm.round(looks=3)
    swarm.held[ROOT] = swarm.held[Bucket(2)] = dict(eves)
    assert all(any(name in swarm.show(bucket) for bucket in swarm.held) for name in mine)
    for _ in range(20):
        seeker = swarm.join(NOWHERE)
        met = set[str]().union(*(swarm.look(seeker, widely=True) for _ in range(6)))
        assert len(met & mine) > len(mine) / 2
        assert swarm.surveys[seeker].sizes()[2] < 2 * len(mine)
        del swarm.surveys[seeker]


def test_a_record_is_filed_somewhere_however_many_there_seem_to_be() -> None:
    survey = Survey(Spot(0, (1 << 64) - 1), random.Random(1))
    survey.saw(ROOT, range(FULL), {0})
    for bits in range(BITS_MOST + 1):
        survey.saw(Bucket(0, bits), range(FULL), {0})
    assert survey.filed((0,))[-1] == Bucket(0, BITS_MOST)


def test_names_of_buckets_differ_by_run_and_place() -> None:
    buckets = [ROOT, Bucket(NOWHERE), *(Bucket(0, 2, prefix) for prefix in range(4)), Bucket(0), Bucket(2)]
    keys = {bucket.key(run) for bucket in buckets for run in (RUN, b"other run".ljust(32))}
    assert len(keys) == 2 * len(buckets) and {len(key) for key in keys} == {20}
    assert EVERYBODY != NOWHERE
