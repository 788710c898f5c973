"""Markdown that a model wrote, as HTML that does nothing and asks no other place for anything.

Raw HTML, links, images and entities are not read as such, so a reader sees what stands there; then
an allow-list without attributes takes out whatever came through.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Final

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

from deploy.screen import visible

_TAGS: Final = {
    *("p", "br", "hr", "blockquote", "pre", "code", "em", "strong", "s", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
_LONGEST: Final = 100_000
"""Characters; a longer text is shown as it is."""


@lru_cache(maxsize=256)
def rendered(text: str) -> Markup | None:
    """Return a text as HTML; None of one that is too long for it."""
    if len(text) > _LONGEST:
        return None
    html = _reader().render(visible(text))
    return Markup(nh3.clean(html, tags=_TAGS, attributes={}, url_schemes=set(), link_rel=None))


@cache
def _reader() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return reader.disable(
        ["link", "image", "autolink", "reference", "html_block", "html_inline", "entity"]
    )
