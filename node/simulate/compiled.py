"""Compiled by numba, where it is there: the events of ten thousand peers, and the policies that they call.

The policies are those of `training.pipeline`, compiled from their source as it stands; nothing is written
twice. Without numba all of it runs as Python, some forty times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from shoal.training.pipeline import routing, standing

try:
    from numba import njit
    from numba.extending import register_jitable
except ImportError:  # pragma: no cover - the same results without it
    njit = register_jitable = None

F = TypeVar("F", bound=Callable[..., Any])
_POLICIES: tuple[Callable[..., object], ...] = (
    routing.expected_finish_s,
    routing.cost_s,
    routing.sample,
    routing.best,
    routing.is_full,
    routing.busy_for_s,
    standing.averaged,
    standing.narrowed,
    standing.after_answer,
    standing.after_forward,
    standing.after_refusal,
    standing.after_failure,
    standing.is_established,
    standing.is_admitted,
    standing.as_candidate,
    standing.expected_service_s,
)

if register_jitable is not None:
    for _policy in _POLICIES:
        register_jitable(_policy)  # from now on compiled code may call it; everybody else calls it as before


def compiled(function: F) -> F:
    """A decorator: this function is compiled when it is first called."""
    return function if njit is None else cast(F, njit(function))
