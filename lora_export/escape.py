"""Text from a model, made safe for a line, a terminal and a Markdown page."""

import re
from typing import Any


def shown(text: str) -> str:
    """The text on one line of a terminal or a log, with everything unprintable escaped, newlines included.

    Otherwise a tensor's name could move the cursor, add a line "try: …" of its own, or (with a lone surrogate) be
    something that no stream can write.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(value: Any) -> str:
    """Control characters, newlines among them, as spaces: for labels, headings and table cells."""
    return re.sub(r"[\x00-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", str(value)).strip()


def printable(value: Any) -> str:
    """Text from a model with its newlines, but without what XML and terminals cannot handle."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", "\ufffd", str(value))


def markdown(value: Any) -> str:
    """Escaped for a Markdown paragraph or table cell: names cannot become markup, HTML, links or mentions."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text)
    return text.replace("@", "&#64;").replace("://", "&#58;//")


def without_secrets(text: str) -> str:
    """A path, Hub ID or URL without the user, password and query of a URL, which may hold keys."""
    scheme, found, rest = text.partition("://")
    if not found:
        return text
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
