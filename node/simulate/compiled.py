"""The entrances to a policy simulation: as Python for a small one, compiled by numba for a large one.

Whatever is behind them is compiled from its source as it stands, the policies of `training.pipeline` among
it: nothing is written twice. Compiling takes 20 s or so, which a large simulation wins back many times over.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from shoal.node.simulate import choice, passage, tables
from shoal.training.pipeline import routing, standing

_MODULES = (routing, standing, tables, choice, passage)


class Entrances(NamedTuple):
    """What `flow` calls."""

    world: Callable[[tables.Rules, tables.Tables], Any]
    run: Callable[..., Any]
    drive: Callable[..., Any]
    introduce: Callable[..., Any]
    part: Callable[..., Any]
    die: Callable[..., Any]


PLAIN = Entrances(tables.World, passage.run, passage.drive, passage.introduce, passage.part, passage.die)


@functools.cache
def compiled() -> Entrances:
    """The same, compiled; PLAIN without numba."""
    try:
        import numba
        from numba.experimental.jitclass.decorators import jitclass
        from numba.extending import register_jitable
    except ImportError:
        return PLAIN
    for function in dict.fromkeys(_functions()):
        register_jitable(function)  # compiled code may call it; everybody else calls it as before
    typeof: Any = numba.typeof
    rules = tables.Rules(1, 1, 1, 1, 1.0, 1.0, 1.0, True, 0)
    small = tables.empty_tables(1, 1)
    kinds = [("rules", typeof(rules))]
    kinds += [(name, typeof(array)) for name, array in small._asdict().items()]
    world = jitclass(kinds)(tables.World)
    return Entrances(world, *(numba.njit(entrance) for entrance in PLAIN[1:]))


def _functions() -> Iterator[Callable[..., object]]:
    """All of these modules'; those that cannot be compiled are not called from there."""
    for module in _MODULES:
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                yield function
