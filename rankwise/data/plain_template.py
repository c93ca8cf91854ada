"""What a template is, and the three that need no Jinja.

- plain, for tokenizers without a chat template: `### User:\\n...\\n\\n### Assistant:\\n...<eos>`, a blank line
  between turns;
- completion: the prompt and its completion with nothing around them, a line break between them unless the prompt ends
  in white space, then `<eos>`: one prompt and one answer a row;
- text, for rows of that format: the whole text and `<eos>`, all of it trained on.

These get the tokenizer's beginning-of-text token in front if the tokenizer adds it by itself (a chat template writes
its own special tokens).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rankwise.data.fields import ASSISTANT, SYSTEM, TEXT, USER, RowError, Turn
from rankwise.data.messages import tool_parts
from rankwise.errors import RequestError

Span = tuple[int, int]

HEADERS = {SYSTEM: "### System:\n", USER: "### User:\n", ASSISTANT: "### Assistant:\n"}
"""Headers of the plain template."""


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    `spans`: trained [start, end) characters, in order; `prompt`: what generation of the last answer starts from ("" for
    plain text); `prompt_fits`: whether `text` begins with `prompt`; `weights`: of each span, none where all are 1.
    """

    text: str
    spans: tuple[Span, ...]
    prompt: str
    prompt_fits: bool = True
    weights: tuple[float, ...] = ()


def span_weights(turns: Sequence[Turn]) -> tuple[float, ...]:
    """The weights of the answers that are trained on, in order; none where all are 1."""
    weights = tuple([turn.weight for turn in turns if turn.role == ASSISTANT and turn.train])
    return () if all(weight == 1 for weight in weights) else weights


class Template(abc.ABC):
    """How turns become text.

    Args:
        prefix_ids: tokens in front of every text (the beginning-of-text token, where the tokenizer adds it).
        stop_tokens: the tokens that end an answer, as text.
        notes: what the user should know about the choice of template, one sentence each.
    """

    def __init__(self, prefix_ids: tuple[int, ...], stop_tokens: tuple[str, ...], notes: tuple[str, ...]):
        self.prefix_ids = prefix_ids
        self.stop_tokens = stop_tokens
        self.notes = notes

    @abc.abstractmethod
    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of a training row.

        Raises: RowError when the template can't take these turns; RequestError when it can't be trained with at all.
        """

    @abc.abstractmethod
    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text from which the next answer is generated.

        Raises: RowError when the template can't take these turns.
        """


class PlainTemplate(Template):
    """`### User:` and so on, for models without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, notes: tuple[str, ...] = ()):
        self.end = end_of_text(tokenizer)
        super().__init__(beginning(tokenizer), (self.end,), notes)

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Each turn under its header; an answer is trained from after its header to its end token."""
        _check_no_tools(turns, "plain")
        text, spans, prompt = "", [], ""
        for turn in turns:
            text += ("\n\n" if text else "") + HEADERS[turn.role]
            start = len(text)
            if turn.role == ASSISTANT:
                prompt = text
                text += turn.content + self.end
                if turn.train:
                    spans.append((start, len(text)))
            else:
                text += turn.content
        return Rendered(text, tuple(spans), prompt, weights=span_weights(turns))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The turns and the header of an answer."""
        return self.render([*turns, Turn(ASSISTANT, "")]).prompt


class CompletionTemplate(Template):
    """A prompt and what follows it, for base models."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.end = end_of_text(tokenizer)
        super().__init__(beginning(tokenizer), (self.end,), ())

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The prompt, then the completion and the end token, which are trained on."""
        _check_no_tools(turns, "completion")
        prompt = self.prompt(turns[:-1])
        text = prompt + turns[-1].content + self.end
        return Rendered(text, ((len(prompt), len(text)),), prompt, weights=span_weights(turns))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The user's text, and a line break unless it ends in white space."""
        _check_no_tools(turns, "completion")
        if [turn.role for turn in turns] != [USER]:
            roles = ", ".join(turn.role for turn in turns) or "no turn"
            raise RowError(f"chat_template 'completion' takes one user turn and its answer, not {roles} before it")
        content = turns[0].content
        return content if content[-1:].isspace() else content + "\n"


class TextTemplate(Template):
    """Text as it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.end = end_of_text(tokenizer)
        super().__init__(beginning(tokenizer), (self.end,), ())

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text and the end token, all of it trained on."""
        text = turns[0].content + self.end
        return Rendered(text, ((0, len(text)),), "")

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text to continue."""
        if len(turns) != 1 or turns[0].role not in (USER, TEXT):
            raise RowError(f"a model of plain text continues one text, not a conversation of {len(turns)} turns")
        return turns[0].content


def _check_no_tools(turns: Sequence[Turn], name: str) -> None:
    """Raises: RequestError for what only a chat template may know how to write."""
    found = tool_parts(turns)
    if found:
        raise RequestError(
            f"the template '{name}' does not write {found[0]}; use a chat template that does "
            "(data.chat_template: auto, or a .jinja file), or write them as text"
        )


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's end-of-text token, which ends an answer where no chat template does.

    Raises: RequestError when there is none, or its text is not read as that one token.
    """
    token = tokenizer.eos_token
    if token is None or tokenizer.eos_token_id is None:
        raise RequestError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-text token, so generation would never stop; "
            "set its eos_token, or data.chat_template to a template that ends answers with a token of its own"
        )
    if tokenizer(f"a{token}", add_special_tokens=False)["input_ids"][-1] != tokenizer.eos_token_id:
        raise RequestError(
            f"the tokenizer '{tokenizer.name_or_path}' does not read its end-of-text token '{token}' as one token; "
            "mark it as special in tokenizer.json"
        )
    return str(token)


def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The beginning-of-text token, if the tokenizer adds it to a text by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ()
    first = (token_id(tokenizer, str(tokenizer.bos_token)),)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return first if whole[:1] == [bos] and bare[:1] != [bos] else ()


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The number of a token of the vocabulary."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int), token
    return number
