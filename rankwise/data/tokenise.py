"""Texts to tokens, many at once, and the tokens of beginnings without tokenising them again.

A fast tokenizer cuts a text at its added tokens before anything else, and each piece by itself becomes tokens. So the
tokens of a prompt that ends in `<|im_start|>assistant` and a line break are those of the whole text up to
`<|im_start|>`, then those of the short rest, which is the same in every row. That holds for added tokens that are
searched in the text as it is written (not `normalized`), take no white space beside them (`lstrip`, `rstrip`) and do
not look at what follows (`single_word`); beginnings with no such token are tokenised like any text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tokenizers import Encoding
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_MOST_REST_TOKENS = 16
"""The rest behind the last added token is looked for no further back than that."""
_MOST_RESTS = 1000


class Tokeniser:
    """Args: tokenizer: a fast one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
        self._splits_special = bool(getattr(tokenizer, "split_special_tokens", False))
        self._cuts: dict[int, str] = {}
        if not self._splits_special:
            decoder = cast("dict[int, AddedToken]", tokenizer.added_tokens_decoder)
            self._cuts = {
                number: token.content
                for number, token in decoder.items()
                if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
            }
        self._rests: dict[tuple[int, str], list[int] | None] = {}

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """What `tokenizer(texts, add_special_tokens=False)` finds, before it is made into lists."""
        backend = self._backend
        backend.no_truncation()  # what another call may have left
        backend.no_padding()
        backend.encode_special_tokens = self._splits_special
        return backend.encode_batch(texts, add_special_tokens=False)

    def beginnings(self, texts: Sequence[str], known: Sequence[tuple[str, Encoding] | None]) -> list[list[int]]:
        """The token ids of each text. `known`: a text that begins with it, and its tokens, where there is one."""
        found: list[list[int] | None] = []
        for text, whole in zip(texts, known, strict=True):
            if not text:
                found.append([])
            else:
                found.append(None if whole is None else self._of_beginning(text, *whole))
        missing = [place for place, ids in enumerate(found) if ids is None]
        for place, encoding in zip(missing, self.encodings([texts[place] for place in missing]), strict=True):
            found[place] = encoding.ids
        return cast("list[list[int]]", found)

    def _of_beginning(self, text: str, whole: str, encoding: Encoding) -> list[int] | None:
        """By the last added token in the text; None where there is none that its end can be told by."""
        last = encoding.char_to_token(len(text) - 1)
        if last is None:
            return None
        ids = encoding.ids
        for place in range(last, max(last - _MOST_REST_TOKENS, -1), -1):
            content = self._cuts.get(ids[place])
            if content is None:
                continue
            span = encoding.token_to_chars(place)
            if span is None or span[1] > len(text) or whole[span[0] : span[1]] != content:
                return None
            rest = self._rest(ids[place], content, text[span[1] :])
            return None if rest is None else ids[: place + 1] + rest
        return None

    def _rest(self, token: int, content: str, rest: str) -> list[int] | None:
        """The tokens of what follows that added token."""
        if not rest:
            return []
        key = (token, rest)
        if key not in self._rests:
            if len(self._rests) == _MOST_RESTS:
                self._rests.clear()
            ids = self.encodings([content + rest])[0].ids
            self._rests[key] = ids[1:] if ids[:1] == [token] else None
        return self._rests[key]
