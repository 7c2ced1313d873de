"""The page before the page: a button that spends the one-time link. Text and a style, no script.

Opening the link alone spends nothing, since previews and prefetching open links too.
"""

from __future__ import annotations

from html import escape

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#17212b;--soft:#52606d;--line:#dde3ea;
--go:#0b6b7c}
@media(prefers-color-scheme:dark){:root{--bg:#0e1419;--card:#161e26;--ink:#e8edf2;--soft:#a3b1bf;--line:#2a3642;--go:#5cc4d6}}
*{box-sizing:border-box}body{margin:0;min-height:100vh;display:grid;place-items:center;background:var(--bg);
color:var(--ink);font:16px/1.5 system-ui,sans-serif;padding:24px}
main{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:32px;max-width:440px;
width:100%}
h1{font-size:20px;margin:0 0 8px}p{margin:0 0 20px;color:var(--soft)}
a{color:var(--go)}code{font:14px ui-monospace,monospace;color:var(--ink)}
button{font:inherit;font-weight:600;border:0;border-radius:8px;padding:10px 20px;background:var(--go);
color:var(--card);cursor:pointer;width:100%}
button:focus-visible{outline:3px solid var(--go);outline-offset:3px}
"""


def login_page(code: str, nonce: str, trouble: str = "") -> str:
    """HTML. `code` is what the link carried, "" if nothing; `trouble` a sentence of ours."""
    if code:
        body = (
            "<p>This link signs you in once, on this browser, for twelve hours.</p>"
            '<form method="post" action="/login">'
            f'<input type="hidden" name="code" value="{escape(code, quote=True)}">'
            '<button type="submit" autofocus>Sign in</button></form>'
        )
    else:
        body = (
            f"<p>{escape(trouble)} Open the link that the daemon printed at its start, or make "
            "another on its machine with</p><p><code>shoal dashboard</code></p>"
            '<p><a href="/">Signed in on this browser already?</a></p>'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Shoal: sign in</title>'
        '<link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<style nonce="{nonce}">{_STYLE}</style></head>'
        f"<body><main><h1>Shoal</h1>{body}</main></body></html>"
    )
