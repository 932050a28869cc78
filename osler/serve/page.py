"""The chat page: one HTML text with its style and its scripts in it, which talks only to the server that sent it.

Its content policy names the style and the script by their hashes, so no text that a model writes can act as style or script.
"""

import base64
import hashlib
from importlib import resources

STYLE = ("osler.report/house.css", "osler.serve/page.css")
SCRIPT = ("osler.report/theme.js", "osler.serve/wire.js", "osler.serve/turn.js", "osler.serve/page.js")


def chat_page() -> tuple[str, dict[str, str]]:
    """Return the page, and the headers to send it with."""
    style, script = ("".join(map(_text, files)) for files in (STYLE, SCRIPT))
    page = _text("osler.serve/page.html").replace("/* style */", style).replace("/* script */", script)
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon, which is empty
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return page, {
        "Content-Security-Policy": "; ".join(f"{what} {sources}" for what, sources in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _text(file: str) -> str:
    package, _, name = file.partition("/")
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
