"""A Jinja chat template, and where in its text the answers are.

Where the template marks them itself, with `{% generation %}` blocks, these are the answers. Otherwise they are found by
rendering: the conversation up to an answer, with the generation prompt, must be a prefix of the whole conversation's
text, letter by letter; the answer begins there and ends with the template's end token. A template for which that does
not hold (one that moves the system prompt, or rewrites earlier turns) is refused, never guessed at.

What ends an answer is learned from a probe: the first token of the vocabulary's added ones that the template writes
after the last answer. Later white space is not trained on. A second probe tells whether the template writes tools,
calls and their results, and what ends a call; a call is trained on from its prompt to that end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
    render_jinja_template,
)

from rankwise.data.fields import ASSISTANT, USER, RowError, Turn
from rankwise.data.messages import CALLS, TOOL_PROBES, Message, as_messages, tool_parts
from rankwise.data.plain_template import Rendered, Span, Template, span_weights
from rankwise.errors import RequestError

Tools = list[dict[str, Any]] | None

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE_USER, _PROBE_ANSWER = "Probe of the user", "Probe of the answer"
_REMEDY = (
    "use a template with {% generation %} blocks around the answers (data.chat_template: a .jinja file), "
    "or data.chat_template=plain"
)


class ChatTemplate(Template):
    """Args: source: the Jinja text; name: what to call it in messages.

    Raises: RequestError when the template has mistakes, leaves answers out, or ends them with no token of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, name: str):
        self.tokenizer = tokenizer
        self.source = source
        self.name = name
        self.has_blocks = _GENERATION.search(source) is not None
        self._added = _added_tokens(tokenizer)
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        try:
            self._compiled = _compile_jinja_template(source)
            self._fixed = {**self._compiled.globals, **self._special, "documents": None}
            self.end, notes = self._probe()
            self._unwritten, self.call_end = self._probe_tools()
        except (TemplateError, TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{name} fails on a question and its answer: {error}; {_REMEDY}") from None
        if "strftime_now" in source:
            notes.append(f"{name} writes today's date into the text: runs on different days differ")
        super().__init__((), tuple(dict.fromkeys((self.end, self.call_end))), tuple(notes))

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The template's text, with the answers found in it."""
        self._check_tools(turns)
        messages, tools = as_messages(turns)
        num_tools = len(turns) - len(messages)
        try:
            text, blocks = self._whole(messages, tools)
            prompts = [
                self._rendered(messages[: index - num_tools], tools, is_prompt=True)
                for index, turn in enumerate(turns)
                if turn.role == ASSISTANT and (not self.has_blocks or index == len(turns) - 1)
            ]
        except TemplateError as error:
            raise RowError(f"{self.name} refuses the row: {error}") from None
        spans = self._block_spans(text, blocks, turns) if self.has_blocks else self._prefix_spans(text, prompts, turns)
        return Rendered(text, spans, prompts[-1], text.startswith(prompts[-1]), span_weights(turns))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The template's text with its generation prompt."""
        self._check_tools(turns)
        try:
            return self._prompt_text(turns)
        except TemplateError as error:
            raise RowError(f"{self.name} refuses them: {error}") from None

    def _prefix_spans(self, text: str, prompts: Sequence[str], turns: Sequence[Turn]) -> tuple[Span, ...]:
        """Answers by the prefix property: each begins where its prompt ends, and ends with the end token."""
        answers = [index for index, turn in enumerate(turns) if turn.role == ASSISTANT]
        spans: list[Span] = []
        for number, (prompt, index) in enumerate(zip(prompts, answers, strict=True)):
            answer = turns[index]
            if not text.startswith(prompt):
                raise RequestError(
                    f"{self.name} writes the conversation before answer {number + 1} of {len(answers)} differently "
                    f"once the answer follows (from character {first_difference(text, prompt)} on), so answers can't "
                    f"be told from prompts; {_REMEDY}"
                )
            start = len(prompt)
            stop = len(prompts[number + 1]) if number + 1 < len(prompts) else len(text)
            if answer.calls:
                end = self._end_of_calls(text, start, turns[: index + 1])
            else:
                end = self._end_after(text, start, answer.content)
            written = text[start:end]
            said = (answer.content.strip(), *(call.name for call in answer.calls))
            if not start < end <= stop or not all(part in written for part in said):
                raise RowError(f"{self.name} changes answer {number + 1}, or does not end it with '{self.end}'")
            if answer.train:
                spans.append((start, end))
        return tuple(spans)

    def _end_of_calls(self, text: str, start: int, turns: Sequence[Turn]) -> int:
        """Where the last token of an answer with calls ends: the last added one before what follows; -1 if none."""
        whole = self._text(turns)[0].rstrip()
        if not text.startswith(whole):
            raise RequestError(f"{self.name} writes a tool call differently once its result follows; {_REMEDY}")
        ends = [match.end() for match in self._added.finditer(whole, start)]
        return ends[-1] if ends else -1

    def _end_after(self, text: str, start: int, answer: str) -> int:
        """Where the end token that follows the answer ends; -1 if there is none."""
        written = next((part for part in (answer, answer.strip()) if text.startswith(part, start)), "")
        found = text.find(self.end, start + len(written))
        return -1 if found < 0 else found + len(self.end)

    def _block_spans(self, text: str, blocks: Sequence[Span], turns: Sequence[Turn]) -> tuple[Span, ...]:
        """Answers by generation blocks, each with the end token that follows it, if the block leaves that out."""
        spans = [(start, self._with_end(text, end)) for start, end in blocks if end > start]
        if not spans:
            raise RowError(f"{self.name} has generation blocks, but marks nothing of this row")
        answers = [turn for turn in turns if turn.role == ASSISTANT]
        if all(turn.weight == 1 for turn in answers):
            return tuple(spans)
        if len(spans) != len(answers):
            raise RowError(
                f"{self.name} has {len(spans)} generation blocks for {len(answers)} answers, so those with train false "
                "or a weight can't be told from the others"
            )
        return tuple(span for span, turn in zip(spans, answers, strict=True) if turn.train)

    def _with_end(self, text: str, end: int) -> int:
        rest, before = text[end:], text[:end].rstrip()
        for token in (self.end, self.call_end):
            if before.endswith(token):
                return end
            if rest.lstrip().startswith(token):
                return end + len(rest) - len(rest.lstrip()) + len(token)
        return end

    def _probe(self) -> tuple[str, list[str]]:
        """The end token and notes, from one question and its answer."""
        turns = (Turn(USER, _PROBE_USER), Turn(ASSISTANT, _PROBE_ANSWER))
        text, blocks = self._text(turns)
        prompt = self._prompt_text(turns[:1])
        place = text.rfind(_PROBE_ANSWER)
        if place < 0:
            raise RequestError(f"{self.name} leaves the answer out of the text; use another template")
        after = place + len(_PROBE_ANSWER)
        match = self._added.search(text, after)
        if match is None:
            raise RequestError(
                f"{self.name} ends an answer with no token of its own, so generation would never stop; "
                "let it write one, such as {{ eos_token }}, after each answer"
            )
        if not self.has_blocks:
            return match.group(), []
        fits = text.startswith(prompt)
        notes = [] if fits else [f"{self.name} writes another prompt for generation than for training"]
        block = next((block for block in blocks if block[0] <= place and after <= block[1]), None)
        if block is None:
            raise RequestError(f"{self.name} has generation blocks, but none around the answer; move them")
        if fits and block[0] < len(prompt):
            raise RequestError(
                f"{self.name}: its generation block holds the header before the answer; begin it after the header"
            )
        if block[1] < match.end():
            notes.append(
                f"{self.name} leaves '{match.group()}' out of its generation blocks; it is trained all the same"
            )
        return match.group(), notes

    def _probe_tools(self) -> tuple[dict[str, str], str]:
        """What of tools the template does not write, and why; and the token that ends a call."""
        unwritten: dict[str, str] = {}
        end = self.end
        for what, (turns, words) in TOOL_PROBES.items():
            try:
                text = self._text(turns)[0]
            except (TemplateError, TypeError, ValueError) as error:
                unwritten[what] = f"it fails on them: {' '.join(str(error).split())}"
                continue
            if words not in text:
                unwritten[what] = "it leaves them out of the text"
            elif what == CALLS and (after := list(self._added.finditer(text, text.rfind(words)))):
                end = after[-1].group()
        return unwritten, end

    def _check_tools(self, turns: Sequence[Turn]) -> None:
        """Raises: RequestError for tools, calls or results that the template does not write."""
        for what in tool_parts(turns):
            if what in self._unwritten:
                raise RequestError(
                    f"{self.name} does not write {what}: {self._unwritten[what]}; use a template that does "
                    "(data.chat_template: a .jinja file), or write them as text"
                )

    def _text(self, turns: Sequence[Turn]) -> tuple[str, Sequence[Span]]:
        """The whole conversation's text, and its generation blocks (none where the template has none)."""
        return self._whole(*as_messages(turns))

    def _prompt_text(self, turns: Sequence[Turn]) -> str:
        return self._rendered(*as_messages(turns), is_prompt=True)

    def _whole(self, messages: list[Message], tools: Tools) -> tuple[str, Sequence[Span]]:
        if not self.has_blocks:
            return self._rendered(messages, tools, is_prompt=False), ()
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=cast(Any, tools),
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self._special,
        )
        texts, blocks = rendered
        return texts[0], blocks[0]

    def _rendered(self, messages: list[Message], tools: Tools, is_prompt: bool) -> str:
        """What `apply_chat_template` gives, without what it does again for each row: two thirds of its time."""
        if not messages:
            raise TemplateError("a conversation needs a message")
        variables = {**self._fixed, "messages": messages, "tools": tools, "add_generation_prompt": is_prompt}
        environment, compiled = self._compiled.environment, self._compiled
        context = environment.context_class(environment, variables, compiled.name, compiled.blocks)
        return "".join(compiled.root_render_func(context))


def read_template(path: str) -> str:
    """The text of a `.jinja` file.

    Raises: RequestError when it isn't there or can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"chat template '{path}' can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"chat template '{path}' is not UTF-8; save it as UTF-8") from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's special tokens, as text."""
    special = [token.content for token in _added(tokenizer) if token.special]
    return list(dict.fromkeys([*special, *tokenizer.all_special_tokens]))


def _added(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    decoder = cast("dict[int, AddedToken]", tokenizer.added_tokens_decoder)
    return list(decoder.values())


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds added tokens, special or not, in a text; those of white space alone are ordinary text to a template."""
    added = {token.content for token in _added(tokenizer)}
    tokens = [token for token in added.union(tokenizer.all_special_tokens) if token.strip()]
    if not tokens:
        raise RequestError("the tokenizer has no special tokens, so a chat template can't end answers; use a plain one")
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def first_difference(one: str, other: str) -> int:
    """How many letters two texts share from the beginning."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
