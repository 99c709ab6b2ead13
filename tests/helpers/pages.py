"""An HTML page taken apart: that its tags nest, what it says, and that nothing on it runs or is loaded."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "img", "br", "hr", "link", "input"}


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1}{0$ \\undefined",
    "a&b;</style></td>'\"`",
    "\x00\x1b[31m\u202eevil\ud800\u2028",
    "=HYPERLINK(http://example.com)" + "x" * 5000,
]


class Page(HTMLParser):
    """Checks that tags nest, and collects what is on the page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.open, self.tags, self.said = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        assert len(attrs) == len(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)

    def all(self, name):
        return [attrs for tag, attrs, _ in self.tags if tag == name]

    @property
    def words(self):
        return " ".join(" ".join(self.said).split())


def check_safe(page):
    """Nothing that runs or is loaded from anywhere."""
    names = {tag for tag, _, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "svg", "video", "audio", "input"}
    for tag, attrs, _ in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert "style" not in attrs and set(attrs) & {"srcset", "action", "background"} == set()
        assert attrs.get("href", "#").startswith("#")
        if "src" in attrs:
            assert attrs["src"].startswith(("data:image/svg+xml;base64,", "data:image/png;base64,"))
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    style = page.text[page.text.index("<style>") : page.text.index("</style>")]
    assert "url(" not in style and "@import" not in style


def pictures(page):
    """The XML of every SVG on the page."""
    sources = [img["src"] for img in page.all("img")]
    return [ElementTree.fromstring(base64.b64decode(s.partition(",")[2])) for s in sources if "svg+xml" in s]
