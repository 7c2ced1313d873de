"""A live run's decisions, made again: `shoal simulate RUN.TOML --replay FILE`.

`training.decisions` wrote down what each policy saw and what it said. Here the policies of this program are
asked the same; where they say something else, the two differ in code, in the run's spec, or the policy is
not as pure as it should be.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.protocol.errors import UsageError
from shoal.training.decisions import plain
from shoal.training.outer.policy import GroupMember, Position, next_action, succession
from shoal.training.partition import spec_costs
from shoal.training.pipeline.routing import Candidate, choose
from shoal.training.rebalance import Placed, plan
from shoal.training.spec import RunSpec

Seen = Mapping[str, Any]


@dataclass
class Replay:
    """What came of it."""

    decisions: Counter[str] = field(default_factory=Counter)  # by policy
    differences: list[str] = field(default_factory=list)

    def told(self) -> str:
        counts = ", ".join(f"{count:,} {policy}" for policy, count in sorted(self.decisions.items()))
        return f"decided again: {counts or 'nothing'}; {len(self.differences)} differ"


def replay(spec: RunSpec, paths: Iterable[Path]) -> Replay:
    """Decide everything in these files again. Raises UsageError for a line that is no decision."""
    found = Replay()
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    break  # the process was killed while it wrote
                policy, before, now = _again(spec, line, f"{path}, line {number}")
                found.decisions[policy] += 1
                if now != before:
                    found.differences.append(f"{path}, line {number}: {policy} said {before}, now {now}")
    return found


def _again(spec: RunSpec, line: str, where: str) -> tuple[str, object, object]:
    """(policy, its answer then, its answer now)."""
    try:
        seen = json.loads(line)
        policy = str(seen["policy"])
        return policy, seen["answer"], plain(_POLICIES[policy](spec, seen))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{where} is no decision of this version: {error!r}") from error


def _route(spec: RunSpec, seen: Seen) -> object:
    candidates = [Candidate(**row) for row in seen["candidates"]]
    chosen = choose(candidates, seen["payload_bytes"], random.Random(seen["seed"]))
    return None if chosen is None else chosen.peer


def _move(spec: RunSpec, seen: Seen) -> object:
    replicas = [Placed(**row) for row in seen["replicas"]]
    return plan(replicas, spec_costs(spec), spec.stages.minimum_replicas, seen["move_s"])


def _lead(spec: RunSpec, seen: Seen) -> object:
    """Who would follow whom as leader, and what this replica therefore did."""
    position = dict(seen["position"])
    group = [_member(row) for row in position["group"]]
    height = position["height"] + 1
    order = succession(spec.run_id(), seen["stage"], height, [member.peer for member in group])
    action = next_action(Position(**{**position, "group": group, "order": order}))
    return {"action": type(action).__name__, "order": order}


def _member(row: Seen) -> GroupMember:
    digests = {name: bytes.fromhex(row[name]) for name in ("head", "state_root")}
    return GroupMember(**{**row, **digests})


_POLICIES: dict[str, Callable[[RunSpec, Seen], object]] = {"route": _route, "move": _move, "lead": _lead}
