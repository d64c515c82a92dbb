"""The page at /: page.html, a client of the other endpoints that runs in the browser.

Its Content-Security-Policy allows the script and the style in the file, by their hashes, and requests to this server,
nothing else: a text that the page took for HTML by mistake could run nothing and send nothing anywhere.
https://www.w3.org/TR/CSP3/
"""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """The response to every GET of /."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {inline_hash(html, 'script')}; style-src {inline_hash(html, 'style')}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def inline_hash(html: str, tag: str) -> str:
    """The source expression that allows the one inline `tag` element."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
