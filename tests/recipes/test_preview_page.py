"""The page of a preview: everything escaped, what is trained on marked, nothing fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from rankwise.data.config import DataConfig
from rankwise.data.preview import preview
from rankwise.recipes.preview_page import marked, page
from tests import tiny
from tests.data.builders import messages, write_rows


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.marks = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "mark":
            self.marks.append(data)


def test_marked_text_is_escaped():
    assert marked("a<b>&c", [(1, 4)]) == "a<mark>&lt;b&gt;</mark>&amp;c"
    assert marked("ab", []) == "ab"


def test_page(tmp_path):
    rows = [messages("<script>alert(1)</script>", "A & B"), messages("Hi", "Yo"), messages("Hi", "Yo")]
    path = write_rows(tmp_path / "train.jsonl", rows)
    with open(path, "a") as file:
        file.write("nonsense <i>\n")
    text = page(preview(DataConfig(train=path), tiny.tiny_tokenizer()), "Data of <run>.yaml")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names and "link" not in names and "i" not in names
    assert tags.marks[1:] == ["A & B<|im_end|>", "Yo<|im_end|>", "Yo<|im_end|>"]  # after the sentence that shows a mark
    (source,) = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert source.startswith("data:image/png;base64,") and not re.search(r"https?://", text)
    assert "1 row equal to an earlier row" in text and f"{path}:4" in text
