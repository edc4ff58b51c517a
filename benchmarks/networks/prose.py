"""English prose of other kinds than novels, from two Debian packages.

``expository()`` is *An Anarchist FAQ* (package ``anarchism``), by several authors of our time;
``technical()`` is the history of Debian (package ``debian-history``).
"""

from __future__ import annotations

import gzip
from html.parser import HTMLParser
from pathlib import Path

from benchmarks.networks.data import find

PACKAGES = Path("/usr/share/doc")
#: Shorter paragraphs are headings, entries of lists and the like.
SHORTEST = 150


def expository() -> str:
    """Return the paragraphs of the FAQ's sections."""
    first = find("secA1.html", [PACKAGES / "anarchism" / "html"])
    parser = _Paragraphs()
    for path in sorted(first.parent.glob("sec*.html")):
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(parser.long())


def technical() -> str:
    """Return the paragraphs of the history, without their line breaks."""
    path = find("project-history.en.txt.gz", [PACKAGES / "debian-history" / "docs"])
    blocks = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n\n")
    paragraphs = (" ".join(block.split()) for block in blocks)
    return "\n\n".join(text for text in paragraphs if len(text) > SHORTEST)


class _Paragraphs(HTMLParser):
    """Collects the text of paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[str] = []
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self._found.append("")
            self._is_inside = True

    def handle_endtag(self, tag: str) -> None:
        self._is_inside &= tag != "p"

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self._found[-1] += data

    def long(self) -> list[str]:
        """Return the paragraphs that are not short."""
        texts = (" ".join(text.split()) for text in self._found)
        return [text for text in texts if len(text) > SHORTEST]
