"""Short answers, and the headers that every answer carries. Called by the guard.

Scripts run only with the nonce of their page: what a peer's text could smuggle in (a script, a handler in an
attribute) has none. 'unsafe-eval' is there because Vue compiles the components' templates in the browser.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

_PAGE_BYTES = 1 << 20  # the page's frame is some 20 kB


def security_headers(nonce: str, secure: bool = False) -> dict[str, str]:
    """For every answer."""
    found = {
        "content-security-policy": (
            "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
            f"script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'"
        ),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "same-origin",  # not no-referrer: with that, browsers hide the origin of posts
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    if secure:
        found["strict-transport-security"] = "max-age=31536000"
    return found


async def answer(
    send: Send,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
    *,
    html: bool = False,
    nonce: str = "",
) -> None:
    """A whole answer."""
    body = text.encode()
    fields = {
        "content-type": f"text/{'html' if html else 'plain'}; charset=utf-8",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **security_headers(nonce),
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def with_nonce(send: Send, nonce: str, secure: bool) -> Send:
    """Adds the headers; gives the nonce to the scripts of a page, which holds no text of anybody's yet."""
    start: Message | None = None
    body = b""

    async def send_marked(message: Message) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            headers.update(security_headers(nonce, secure))
            if headers.get("content-type", "").startswith("text/html"):
                start = message
                return
        elif start is not None and message["type"] == "http.response.body":
            body += message.get("body", b"")
            if message.get("more_body", False) and len(body) < _PAGE_BYTES:
                return
            body = body.replace(b"<script", b'<script nonce="' + nonce.encode() + b'"')
            MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
            await send(start)
            start = None
            message = {"type": "http.response.body", "body": body}
        await send(message)

    return send_marked
