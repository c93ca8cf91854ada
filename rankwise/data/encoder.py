"""Rows to examples: token ids, the labels that are trained on, and what evaluation needs of the last answer.

The whole text is tokenised once, with offsets; a token is trained on if it begins inside a trained span. A token that
begins before the span and reaches into it (a line break of the header merged with one of the answer) is not, and is
counted. A row longer than `max_length` keeps its beginning; one that has no trained token left is dropped and counted.

Rows are encoded a chunk at a time, each chunk by itself: what is known only of all of them (what the prompts of a file
share) is put together afterwards, from what each chunk says of it. So chunks may be encoded anywhere, in any number of
processes, and memory does not grow with the rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from rankwise.data.chat_template import first_difference, special_tokens
from rankwise.data.config import WHOLE, DataConfig
from rankwise.data.example import Example
from rankwise.data.formats import ASSISTANT, TEXT, USER, RowError, Turns
from rankwise.data.layouts import LAYOUTS
from rankwise.data.plain_template import Rendered, Span, Template
from rankwise.data.preferences import first
from rankwise.data.rows import Problem, Row
from rankwise.data.templates import template_for, text_template
from rankwise.data.tokenise import Tokeniser
from rankwise.errors import RequestError
from rankwise.models.batch import IGNORED


@dataclass
class Counts:
    """Rows read, cut, emptied, with a token across the answer's beginning, another prompt, special tokens; words
    whose tag is not learned, because they are cut off or have no token; rows with weights other than 0 and 1.
    """

    rows: int = 0
    truncated: int = 0
    emptied: int = 0
    merged: int = 0
    apart: int = 0
    special: int = 0
    words: int = 0
    weighted: int = 0

    def add(self, other: Counts) -> None:
        """Adds another count's figures to these."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Prompts:
    """What is kept of a file's prompts to know what all begin with: the first and last in order, the shortest length.

    The longest beginning common to the first and the last is common to all that lie between.
    """

    first: str
    last: str
    shortest: int
    """Characters of the shortest prompt, white space at its end not counted."""

    @classmethod
    def of(cls, prompt: str) -> Prompts:
        """Of one prompt."""
        return cls(prompt, prompt, len(prompt.rstrip()))

    def add(self, other: Prompts) -> None:
        """Adds prompts that were seen elsewhere."""
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.shortest = min(self.shortest, other.shortest)

    @property
    def instruction(self) -> str:
        """What all prompts begin with, up to a colon and blank or a line break ("Rewrite in modern English: ").

        The longest beginning common to all of them, cut after its last ": " or line break; "" when there are not two
        different prompts, or one of them would have nothing left.
        """
        if self.first == self.last:
            return ""
        common = self.first[: first_difference(self.first, self.last)]
        end = max(common.rfind(": ") + len(": ") if ": " in common else 0, common.rfind("\n") + 1)
        return common[:end] if self.shortest > end else ""


@dataclass
class Chunk:
    """Some rows, encoded. `examples` lack their `source`, for which all prompts of their file must be known."""

    examples: list[Example] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """The row of each example. A place does not tell them apart: a JSON list may stand on one line."""
    counts: Counts = field(default_factory=Counts)
    prompts: dict[str, Prompts] = field(default_factory=dict)
    """By file."""
    notes: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)


class Encoder:
    """Encodes chunks of rows.

    Args:
        tokenizer: a fast one.
        config: the run's data section.
        layout: how a row becomes sequences, a key of `LAYOUTS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str) -> None:
        self.tokenizer, self.config, self.layout = tokenizer, config, layout
        self._templates: dict[bool, Template] = {}
        self._specials = special_tokens(tokenizer)
        self._special_starts = {token[:1] for token in self._specials}
        self._tokeniser = Tokeniser(tokenizer)

    def encode(self, rows: Sequence[Row]) -> Chunk:
        """Examples of the rows that can be used, in their order, and the problems of the others.

        Raises: RequestError for a template that can't be used.
        """
        chunk = Chunk()
        written = self._render(rows, chunk)
        encodings = self._tokeniser.encodings([rendered.text for item in written for rendered in item.rendered])
        prompts = self._prompts(written, encodings)
        place = 0
        for item, prompt in zip(written, prompts, strict=True):
            parts: list[_Encoded] = []
            for rendered in item.rendered:
                parts.append(_encoded(encodings[place], rendered, item.prefix_ids, self.config.max_length))
                place += 1
            example = _example(item, parts, prompt, self._specials)
            is_emptied = _is_emptied(item, parts, example)
            if not is_emptied:
                chunk.examples.append(example)
                chunk.rows.append(item.row)
            counts = chunk.counts
            counts.rows += 1
            counts.truncated += any(part.was_cut for part in parts)
            counts.emptied += is_emptied
            counts.merged += any(part.is_merged for part in parts)
            counts.apart += _is_apart(item, parts[0], prompt)
            counts.weighted += bool(example.weights)
            counts.special += any(self._has_special(turn.content) for turn in item.row.turns)
            _note_prompt(chunk.prompts, example)
        return chunk

    def _prompts(self, written: Sequence[_Written], encodings: Sequence[Encoding]) -> list[list[int]]:
        """The tokens of each row's prompt alone."""
        known: list[tuple[str, Encoding] | None] = []
        place = 0
        for item in written:
            first_part = item.rendered[0]
            known.append((first_part.text, encodings[place]) if first_part.prompt_fits else None)
            place += len(item.rendered)
        return self._tokeniser.beginnings([item.rendered[0].prompt for item in written], known)

    def _has_special(self, text: str) -> bool:
        """Whether a special token is written in a text; most texts have none of the letters that such begin with."""
        return any(start in text for start in self._special_starts) and any(token in text for token in self._specials)

    def _render(self, rows: Sequence[Row], chunk: Chunk) -> list[_Written]:
        """Each row as text; rows that their template refuses are problems of the chunk, as are the templates' notes."""
        written: list[_Written] = []
        used: dict[bool, Template] = {}
        for row in rows:
            is_text = row.turns[0].role == TEXT
            if is_text not in self._templates:
                self._templates[is_text] = (
                    text_template(self.tokenizer, self.config)
                    if is_text
                    else template_for(self.tokenizer, self.config, self.layout)
                )
            template = used[is_text] = self._templates[is_text]
            try:
                if self.layout != WHOLE:
                    _check_weights(row.turns)
                written.append(_Written(row, LAYOUTS[self.layout](row, template), template.prefix_ids))
            except RowError as reason:
                chunk.problems.append(Problem(row.file, row.line, str(reason)))
            except RequestError as error:
                raise RequestError(f"{row.file}:{row.line}: {error}") from None
        chunk.notes = tuple(note for template in used.values() for note in template.notes)
        return written


def _check_weights(turns: Turns) -> None:
    """Raises: RowError for answers that count in part where the losses are not those of single tokens in one text."""
    for turn in turns:
        if turn.weight not in (0, 1):
            weight = f"an answer has weight {turn.weight:g}"
            raise RowError(f"{weight}; only train.objective sft applies others than 0 and 1")


def _note_prompt(prompts: dict[str, Prompts], example: Example) -> None:
    found = Prompts.of(example.prompt_text)
    if example.file in prompts:
        prompts[example.file].add(found)
    else:
        prompts[example.file] = found


@dataclass(frozen=True)
class _Written:
    """A row as one text or several. `prefix_ids`: tokens in front of each."""

    row: Row
    rendered: tuple[Rendered, ...]
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Encoded:
    """Tokens and labels of one text, cut to length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    was_cut: bool
    is_merged: bool
    uncut_ids: Sequence[int]
    """Without the prefix."""
    weights: tuple[tuple[int, int, float], ...]


def _is_apart(item: _Written, first: _Encoded, prompt: Sequence[int]) -> bool:
    """Whether the prompt alone is tokenised otherwise than in front of its answer."""
    fits = item.rendered[0].prompt_fits and not first.is_merged
    return fits and first.uncut_ids[: len(prompt)] != prompt


def _is_emptied(item: _Written, parts: Sequence[_Encoded], example: Example) -> bool:
    """Whether a part that is trained on has lost every trained token to the cut."""
    trains = [bool(rendered.spans) for rendered in item.rendered]
    lost = (expected and not part.spans for expected, part in zip(trains, parts, strict=True))
    return any(lost) or (any(trains) and not example.num_trained)


def _encoded(encoding: Encoding, rendered: Rendered, prefix: tuple[int, ...], max_length: int) -> _Encoded:
    """Labels from the trained spans. `encoding`: knows which characters of the text each token stands for."""
    ids, text = encoding.ids, rendered.text
    kept = max_length - len(prefix)
    was_cut = len(ids) > kept
    if was_cut:
        text = text[: _characters(encoding, kept - 1)[1]]
    ids_kept = ids[:kept]
    labels = [IGNORED] * (len(prefix) + len(ids_kept))
    runs, is_merged = _trained_runs(encoding, len(ids), rendered.spans)
    spans: list[Span] = []
    for begin, stop in runs:
        stop = min(stop, kept)
        if begin < stop:
            labels[len(prefix) + begin : len(prefix) + stop] = ids_kept[begin:stop]
            end = _characters(encoding, stop - 1)[1]
            spans.append((_characters(encoding, begin)[0], min(end, len(text))))
    return _Encoded(
        ids=(*prefix, *ids_kept),
        labels=tuple(labels),
        text=text,
        spans=tuple(spans),
        was_cut=was_cut,
        is_merged=is_merged,
        uncut_ids=ids,
        weights=_token_weights(encoding, rendered, len(prefix), kept) if rendered.weights else (),
    )


def _token_weights(
    encoding: Encoding, rendered: Rendered, offset: int, kept: int
) -> tuple[tuple[int, int, float], ...]:
    """Runs of tokens that count other than once; the first `kept` tokens of the text stand at `offset` and on."""
    found: list[tuple[int, int, float]] = []
    for span, weight in zip(rendered.spans, rendered.weights, strict=True):
        runs, _ = _trained_runs(encoding, len(encoding.ids), [span])
        found += [(offset + b, offset + min(e, kept), weight) for b, e in runs if b < kept and weight != 1]
    return tuple(found)


def _characters(encoding: Encoding, token: int) -> Span:
    """The characters that a token stands for."""
    found = encoding.token_to_chars(token)
    assert found is not None, "no token is added to the text's own"
    return found


def _trained_runs(encoding: Encoding, num_tokens: int, spans: Sequence[Span]) -> tuple[list[tuple[int, int]], bool]:
    """Runs of tokens that begin inside the spans, and whether some token reaches into one from before it."""
    runs: list[tuple[int, int]] = []
    is_merged = False
    for start, end in spans:
        begin = _first_from(encoding, num_tokens, start, start)
        stop = max(begin, _first_from(encoding, num_tokens, end, end - 1))
        is_merged |= begin > 0 and _characters(encoding, begin - 1)[1] > start
        if begin == stop:
            continue
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((begin, stop))
    return runs, is_merged


def _first_from(encoding: Encoding, num_tokens: int, bound: int, near: int) -> int:
    """The first token that begins at the character `bound` or behind it, looked for from the one of character `near`.

    Tokens begin in the order of the text. So a character that is in no token leaves halving; a table of all tokens'
    characters, which takes Python as long as tokenising takes the tokenizer, is not made.
    """
    place = encoding.char_to_token(near)
    if place is None:
        return bisect_left(range(num_tokens), bound, key=lambda token: _characters(encoding, token)[0])
    while place < num_tokens and _characters(encoding, place)[0] < bound:
        place += 1
    return place


def _example(item: _Written, parts: Sequence[_Encoded], prompt: Sequence[int], specials: Sequence[str]) -> Example:
    """One row, its sequences end to end; in `text` a line break stands between them."""
    row = item.row
    starts = [0, *accumulate(len(part.text) + 1 for part in parts)]
    return Example(
        input_ids=parts[0].ids if len(parts) == 1 else tuple(token for part in parts for token in part.ids),
        labels=parts[0].labels if len(parts) == 1 else tuple(label for part in parts for label in part.labels),
        text="\n".join(part.text for part in parts),
        spans=tuple(
            (start + first, start + last)
            for start, part in zip(starts, parts, strict=False)
            for first, last in part.spans
        ),
        prompt_ids=() if row.turns[0].role == TEXT else (*item.prefix_ids, *prompt),
        prompt_text=_last(first(row.turns), USER),
        answer=_answer(item, specials),
        file=row.file,
        line=row.line,
        parts=tuple(len(part.ids) for part in parts) if len(parts) > 1 else (),
        weights=parts[0].weights,  # other layouts than that of one part have none
    )


def _answer(item: _Written, specials: Sequence[str]) -> str:
    """The last answer as written; one with tool calls, as the template writes it, without special tokens."""
    turns, rendered = first(item.row.turns), item.rendered[0]
    if not turns[-1].calls or not rendered.prompt_fits:
        return _last(turns, ASSISTANT)
    written = rendered.text[len(rendered.prompt) :]
    for token in specials:
        written = written.replace(token, "")
    return written.strip()


def _last(turns: Turns, role: str) -> str:
    """The content of the last turn of that role, "" if there is none."""
    return next((turn.content for turn in reversed(turns) if turn.role == role), "")
