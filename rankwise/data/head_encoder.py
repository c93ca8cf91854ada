"""Rows of classifiers and of embeddings to examples: no template, the tokenizer's own special tokens around each text.

| layout | input_ids | targets |
| --- | --- | --- |
| classes | the text, or two texts in the tokenizer's form for pairs | the class; with several, 0 or 1 for each class |
| tags | the words, each but the first with a space before it | the tag's class at a word's first token, else IGNORED |
| pairs | anchor, positive and negatives end to end, each as it is alone; `parts` are their lengths | 0 |

A text longer than `max_length` keeps its beginning (of two texts the longer one is cut), and is counted. Words that are
cut off, and words that the tokenizer gives no token, have no target and are counted too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from transformers import BatchEncoding, PreTrainedTokenizerBase

from rankwise.data.chat_template import special_tokens
from rankwise.data.config import DataConfig
from rankwise.data.encoder import Chunk, Counts
from rankwise.data.example import Example
from rankwise.data.fields import LABEL, LABELLED, PAIRED, TAG, TAGGED, WORD, RowError
from rankwise.data.rows import Problem, Row
from rankwise.errors import RequestError, did_you_mean
from rankwise.models.batch import IGNORED
from rankwise.models.labels import Labels

CLASSES, TAGS, PAIRS = "classes", "tags", "pairs"
HEAD_LAYOUTS = (CLASSES, TAGS, PAIRS)
HEAD_ROWS = {LABELLED: CLASSES, TAGGED: TAGS, PAIRED: PAIRS}
"""The layout of each kind of row."""


class HeadEncoder:
    """Encodes chunks of rows.

    Args:
        tokenizer: a fast one.
        config: the run's data section; its chat template has no say here.
        layout: one of HEAD_LAYOUTS.
        labels: of the training data; any other one is a problem of its row.

    Raises: RequestError when the special tokens leave no room for a text, or the tokenizer is a slow one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str, labels: Labels | None
    ) -> None:
        assert layout in HEAD_LAYOUTS
        self.tokenizer, self.max_length, self.layout = tokenizer, config.max_length, layout
        self.labels = None if layout == PAIRS else labels or Labels(())
        self._specials = special_tokens(tokenizer)
        if not tokenizer.is_fast:
            raise RequestError("the model's tokenizer has no fast version, by which words and tokens are matched")
        room = self.max_length - tokenizer.num_special_tokens_to_add(pair=layout == CLASSES)
        if room < 2:
            raise RequestError(
                f"data.max_length={self.max_length} leaves no room beside the tokenizer's special tokens; raise it"
            )

    def encode(self, rows: Sequence[Row]) -> Chunk:
        """Examples of the rows that can be used, in their order, and the problems of the others."""
        chunk = Chunk()
        usable: list[tuple[Row, tuple[int, ...]]] = []
        for row in rows:
            try:
                usable.append((row, self._targets(row)))
            except RowError as reason:
                chunk.problems.append(Problem(row.file, row.line, str(reason)))
        encoders = {CLASSES: self._classes, TAGS: self._tags, PAIRS: self._pairs}
        for (row, _), (example, was_cut) in zip(usable, encoders[self.layout](usable), strict=True):
            has_special = any(token in example.text for token in self._specials)
            missed = 0
            if self.layout == TAGS:
                missed = len(example.spans) - example.num_trained  # a span for each word
            emptied = example.num_trained == 0
            chunk.counts.add(Counts(1, was_cut, emptied, 0, 0, has_special, missed))
            if not emptied:
                chunk.examples.append(example)
                chunk.rows.append(row)
        return chunk

    def _targets(self, row: Row) -> tuple[int, ...]:
        """The row's classes by number. Raises: RowError for one that the training data does not have."""
        if self.labels is None:
            return ()
        ids, found = self.labels.ids, _contents(row, TAG if self.layout == TAGS else LABEL)
        for name in found:
            if name not in ids:
                raise RowError(f"'{name}' is no label of the training data{did_you_mean(name, ids)}")
        if self.labels.is_multi:
            return tuple(int(name in found) for name in self.labels.names)
        return tuple(ids[name] for name in found)

    def _classes(self, rows: Sequence[tuple[Row, tuple[int, ...]]]) -> Iterator[tuple[Example, bool]]:
        texts = [_texts(row) for row, _ in rows]
        for (row, targets), given, (ids, types, was_cut) in zip(rows, texts, self._tokens(texts), strict=True):
            written = "\n".join(given)
            said = ", ".join(_contents(row, LABEL)) or "none"
            yield Example(
                input_ids=ids, labels=(IGNORED,) * len(ids), text=f"{written}\n{said}",
                spans=((len(written) + 1, len(written) + 1 + len(said)),), prompt_ids=(), prompt_text=written,
                answer=said, file=row.file, line=row.line, targets=targets, token_type_ids=types,
            ), was_cut  # fmt: skip

    def _tokens(self, texts: Sequence[tuple[str, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
        """Ids, token types (none where there is one text) and whether it was cut, of single texts and of pairs."""
        found: dict[int, tuple[tuple[int, ...], tuple[int, ...], bool]] = {}
        for size in (1, 2):
            places = [place for place, parts in enumerate(texts) if len(parts) == size]
            if not places:
                continue
            encoded = self._call([texts[place][0] for place in places], [texts[place][-1] for place in places], size)
            for index, place in enumerate(places):
                ids = tuple(encoded["input_ids"][index])
                types = tuple(encoded["token_type_ids"][index]) if size > 1 and "token_type_ids" in encoded else ()
                found[place] = ids, types, bool(encoded.encodings and encoded.encodings[index].overflowing)
        return [found[place] for place in range(len(texts))]

    def _call(self, first: list[str], second: list[str], size: int) -> BatchEncoding:
        return self.tokenizer(
            first, second if size > 1 else None, truncation=True, max_length=self.max_length,
            return_attention_mask=False, verbose=False,
        )  # fmt: skip

    def _tags(self, rows: Sequence[tuple[Row, tuple[int, ...]]]) -> Iterator[tuple[Example, bool]]:
        if not rows:
            return
        words = [_contents(row, WORD) for row, _ in rows]
        spaced = [[f" {word}" if place else word for place, word in enumerate(one)] for one in words]
        encoded = self.tokenizer(
            spaced, is_split_into_words=True, truncation=True, max_length=self.max_length,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        for index, ((row, tags), own) in enumerate(zip(rows, words, strict=True)):
            targets, seen = [], set[int]()
            for word in encoded.word_ids(index):
                targets.append(IGNORED if word is None or word in seen else tags[word])
                if word is not None:
                    seen.add(word)
            ids = tuple(encoded["input_ids"][index])
            text, spans = _tagged_text(own, _contents(row, TAG))
            yield Example(
                input_ids=ids, labels=(IGNORED,) * len(ids), text=text, spans=spans, prompt_ids=(),
                prompt_text=" ".join(own), answer=" ".join(_contents(row, TAG)), file=row.file, line=row.line,
                targets=tuple(targets),
            ), len(seen) < len(own)  # fmt: skip

    def _pairs(self, rows: Sequence[tuple[Row, tuple[int, ...]]]) -> Iterator[tuple[Example, bool]]:
        parts = [tuple(turn.content for turn in row.turns) for row, _ in rows]
        encoded = iter(self._tokens([(text,) for one in parts for text in one]))
        for (row, _), texts in zip(rows, parts, strict=True):
            found = [next(encoded) for _ in texts]
            ids = tuple(token for part, _, _ in found for token in part)
            starts = [0, *accumulate(len(text) + 1 for text in texts)]
            yield Example(
                input_ids=ids, labels=(IGNORED,) * len(ids), text="\n".join(texts),
                spans=((starts[1], starts[1] + len(texts[1])),), prompt_ids=(), prompt_text=texts[0], answer=texts[1],
                targets=(0,), file=row.file, line=row.line, parts=tuple(len(part) for part, _, _ in found),
            ), any(was_cut for _, _, was_cut in found)  # fmt: skip


def _tagged_text(words: Sequence[str], tags: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The words with their tags behind a slash, and where the tags stand."""
    spans, text = [], ""
    for word, tag in zip(words, tags, strict=True):
        text += f"{' ' if text else ''}{word}/"
        spans.append((len(text), len(text) + len(tag)))
        text += tag
    return text, tuple(spans)


def _texts(row: Row) -> tuple[str, ...]:
    return tuple(turn.content for turn in row.turns if turn.role not in (LABEL, TAG))


def _contents(row: Row, role: str) -> list[str]:
    return [turn.content for turn in row.turns if turn.role == role]
