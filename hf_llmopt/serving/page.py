"""The page at `/`: one file, which loads nothing and runs no script but its own."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

PAGE = Path(__file__).with_name("page.html").read_text("utf-8")


def _own(tag: str) -> str:
    """The hash by which a browser knows the page's own script or style."""
    inside = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    assert inside is not None
    return f"'sha256-{b64encode(sha256(inside[1].encode()).digest()).decode()}'"


# What a model writes may look like a page. Even if it became markup, a browser would run nothing of it.
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_own('script')}",
        f"style-src {_own('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
