"""A piece of the page that the server redraws: HTML out, what was done in. `live.js` is its other half."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from shoal.node.dashboard.markup import Markup

Did = Callable[[Mapping[str, object]], Awaitable[None]]
_KEYS, _CHARACTERS = 24, 8192


class Live(Element, component="live.js"):
    """Shows `Markup`; calls `did` with the data attributes of what was clicked, and the fields of a form."""

    def __init__(self, tag: str, did: Did) -> None:
        super().__init__()
        self._props["tag"], self._props["html"] = tag, ""

        async def handle(event: GenericEventArguments) -> None:
            if isinstance(event.args, Mapping):
                await did(_bounded(event.args))

        self.on("do", handle)

    def show(self, content: Markup) -> None:
        """Redraw, if there is anything new."""
        if content != self._props["html"]:
            self._props["html"] = str(content)
            self.update()


def _bounded(values: Mapping[object, object]) -> dict[str, object]:
    """What a browser sent, cut to texts and one form of texts."""
    found: dict[str, object] = {}
    for key, value in list(values.items())[:_KEYS]:
        if isinstance(value, Mapping):
            found[str(key)] = {str(k): str(v)[:_CHARACTERS] for k, v in list(value.items())[:_KEYS]}
        else:
            found[str(key)] = str(value)[:_CHARACTERS]
    return found
