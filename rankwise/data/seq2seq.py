"""Rows for encoder-decoder models: the question is the encoder's text, the answer the decoder's.

Both get the special tokens that the tokenizer itself puts around a text (T5: an end token; BART: one on each side), so
that a fine-tuned model sees what it was pretrained on. They are written as text, and it is checked on a probe that this
gives the tokenizer's own ids. The question is the user's text alone, unless a chat template is asked for or the
tokenizer has one; then earlier turns are part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rankwise.data.example import Example
from rankwise.data.fields import SYSTEM, USER, RowError, Turn
from rankwise.data.plain_template import Rendered, Template, end_of_text
from rankwise.errors import RequestError
from rankwise.models.batch import IGNORED
from rankwise.models.seq2seq import Seq2SeqBatch

_PROBE = "a"

Question = Callable[[Sequence[Turn]], str]
"""Writes the turns before an answer."""


class Seq2SeqTemplate(Template):
    """A question for the encoder and its answer for the decoder.

    Args:
        question: writes the turns before the answer.
        end: the token that ends an answer, as text; None: the tokenizer's own.
        is_whole: whether `question` writes special tokens itself, so that none are put around it.
        notes: about the choice of `question`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: Question,
        end: str | None = None,
        is_whole: bool = False,
        notes: tuple[str, ...] = (),
    ):
        self._question = question
        self._before, self._after = ("", "") if is_whole else _affixes(tokenizer, is_answer=False)
        self._start, own_end = _affixes(tokenizer, is_answer=True)
        self._end = end or own_end or end_of_text(tokenizer)
        stop = end or (str(tokenizer.eos_token) if tokenizer.eos_token_id is not None else end_of_text(tokenizer))
        super().__init__((), (stop,), notes)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The answer, all of it trained on; `prompt` is the question."""
        answer = turns[-1]
        if not answer.train or answer.calls:
            what = "calls tools" if answer.calls else "is not trained on"
            raise RowError(f"the last answer {what}; an encoder-decoder model learns the text of the last answer alone")
        text = self._start + answer.content + self._end
        return Rendered(text, ((0, len(text)),), self.prompt(turns[:-1]))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The encoder's text."""
        return self._before + self._question(turns) + self._after


def one_question(turns: Sequence[Turn]) -> str:
    """The user's text; a system text goes in front of it, with a blank line between.

    Raises: RowError for a conversation.
    """
    if [turn.role for turn in turns] not in ([USER], [SYSTEM, USER]):
        roles = ", ".join(turn.role for turn in turns) or "no turn"
        raise RowError(
            f"an encoder-decoder model without a chat template takes one question, not {roles} before the answer; set "
            "data.chat_template=plain to put the whole conversation into it"
        )
    return "\n\n".join(turn.content for turn in turns)


def _affixes(tokenizer: PreTrainedTokenizerBase, is_answer: bool) -> tuple[str, str]:
    """What the tokenizer puts before and after a text (of answers: of target texts), as text.

    Raises: RequestError when written as text it would be read otherwise.
    """
    bare: list[int] = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole: list[int] = (tokenizer(text_target=_PROBE) if is_answer else tokenizer(_PROBE))["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    if starts:
        first, last = starts[0], starts[0] + len(bare)
        before, after = ("".join(_tokens(tokenizer, ids)) for ids in (whole[:first], whole[last:]))
        if tokenizer(before + _PROBE + after, add_special_tokens=False)["input_ids"] == whole:
            return before, after
    raise RequestError(
        f"the tokenizer '{tokenizer.name_or_path}' puts special tokens around a text that it does not read back when "
        "they are written; mark them as special in tokenizer.json"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def collate_seq2seq(examples: Sequence[Example], pad_id: int, packing: bool) -> Seq2SeqBatch:
    """Questions and answers of examples with two `parts`, padded on the right."""
    assert examples and not packing, "encoder-decoder rows are padded"
    questions = [example.input_ids[: example.parts[0]] for example in examples]
    answers = [example.input_ids[example.parts[0] :] for example in examples]
    return Seq2SeqBatch(
        input_ids=_padded(questions, pad_id),
        attention_mask=_padded([(1,) * len(question) for question in questions], 0),
        labels=_padded(answers, IGNORED),
    )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    filled = torch.full((len(rows), max(len(row) for row in rows)), filler, dtype=torch.int64)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return filled
