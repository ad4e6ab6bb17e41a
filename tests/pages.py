"""A page of HTML, taken apart, and words that would like to be more than text."""

from html.parser import HTMLParser

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&"


class Reader(HTMLParser):
    """Collects the elements of a page with their attributes, and its text."""

    void = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [
            found[name] or "" for other, found in self.elements if other == tag if name in found
        ]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
