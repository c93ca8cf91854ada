"""Ollama's Modelfile for an exported GGUF: the template that training used, as a Go template, its stops and parameters.

Ollama does not run the Jinja template that the GGUF carries for every model, so it is written as Go's text/template
(https://github.com/ollama/ollama/blob/main/docs/template.md). It is found by asking: conversations of marks are
rendered by the template that training used, and what stands around the marks becomes the heads and tails of turns. Then
further conversations are rendered both ways; where the two differ, no TEMPLATE is written, and the file says why.
Go itself is not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Message = tuple[str, str]
"""Role (`system`, `user`, `assistant`) and content."""
Render = Callable[[Sequence[Message]], str]
"""From a conversation to the text from which its answer is generated. Raises ValueError for one it can't take."""

SYSTEM_MARK, FIRST_MARK, ANSWER_MARK, SECOND_MARK = "SYSTEMMARK", "FIRSTMARK", "ANSWERMARK", "SECONDMARK"
GO_MARKS = ("{{", "}}", '"""')


@dataclass(frozen=True)
class Turns:
    """What stands around the contents of turns.

    Args:
        begin: before the first turn where there is no system message.
        user, assistant: head and tail of such a turn.
        answer: after the last turn, before the answer.
        system: what stands before and behind the system message, which replaces `begin`; None where the template takes
            no system message.
        in_first_user: whether the system message stands inside the first user's turn, after its head.
    """

    begin: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    system: tuple[str, str] | None = None
    in_first_user: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template makes of a conversation whose system message, if any, comes first."""
        head = {"user": self.user, "assistant": self.assistant}
        texts = [content for role, content in messages if role == "system"]
        parts, begins = [], self.begin
        if texts and self.system is not None and not self.in_first_user:
            begins = self.system[0] + texts[0] + self.system[1]
        parts.append(begins)
        for place, (role, content) in enumerate(message for message in messages if message[0] != "system"):
            before, after = head[role]
            inside = texts[0] + self.system[1] if texts and self.system and self.in_first_user and place == 0 else ""
            parts.append(before + inside + content + after)
        return "".join(parts) + self.answer


def turns_of(render: Render, special: Sequence[str]) -> Turns | str:
    """The turns that `render` writes, or the reason why it can't be written so.

    `special`: texts of special tokens; a turn's head is made to begin with one where it can.
    """
    try:
        begin, tail = _around(render([("user", FIRST_MARK)]), FIRST_MARK)
        talk = [("user", FIRST_MARK), ("assistant", ANSWER_MARK), ("user", SECOND_MARK)]
        _, between, next_turn, _ = _around(render(talk), FIRST_MARK, ANSWER_MARK, SECOND_MARK)
    except ValueError as error:
        return f"the chat template does not take a plain conversation ({error})"
    user_tail = _tail(_common_start(between, tail), special)
    user_head = _head(begin, next_turn, special)
    plain = Turns(
        begin.removesuffix(user_head), (user_head, user_tail),
        (between[len(user_tail) :], next_turn.removesuffix(user_head)), tail[len(user_tail) :],
    )  # fmt: skip
    turns = _with_system(plain, render)
    return _differs(turns, render) or turns


def _with_system(turns: Turns, render: Render) -> Turns:
    try:
        before, behind, _ = _around(render([("system", SYSTEM_MARK), ("user", FIRST_MARK)]), SYSTEM_MARK, FIRST_MARK)
    except ValueError:
        return turns
    head = turns.user[0]
    is_inside = before == turns.begin + head and not (head and behind.endswith(head))
    system = (before, behind) if is_inside else (before, behind.removesuffix(head))
    return Turns(turns.begin, turns.user, turns.assistant, turns.answer, system, is_inside)


def _differs(turns: Turns, render: Render) -> str | None:
    """Why the turns are not what `render` writes; None when all conversations tried are the same."""
    talk = [("user", "Why?"), ("assistant", "So."), ("user", "And\nthen?"), ("assistant", "{No}."), ("user", "Ah")]
    tried: list[list[Message]] = [talk[:1], talk[:3], talk]
    if turns.system is not None:
        tried += [[("system", "Be brief."), *some] for some in (talk[:1], talk[:3], talk)]
    for messages in tried:
        try:
            wanted = render(messages)
        except ValueError as error:
            return f"the chat template does not take {len(messages)} turns ({error})"
        if turns.render(messages) != wanted:
            with_system = " with a system message" if messages[0][0] == "system" else ""
            return f"the chat template is not head, content, tail of each turn ({len(messages)} turns{with_system})"
    texts = (turns.begin, *turns.user, *turns.assistant, turns.answer, *(turns.system or ()))
    if any(mark in text for mark in GO_MARKS for text in texts):
        return "the chat template writes marks of Go's templates"
    return None


def _around(text: str, *marks: str) -> list[str]:
    """What stands before, between and behind the marks. Raises: ValueError where they are not each there once."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("it leaves a message out, or writes it twice")
        parts.append(before)
    return [*parts, text]


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _tail(text: str, special: Sequence[str]) -> str:
    """The part of the user's tail and the assistant's head before the special token that the head begins with."""
    for place in range(1, len(text)):
        if any(text.startswith(token, place) for token in special if token):
            return text[:place]
    return text


def _head(begin: str, next_turn: str, special: Sequence[str]) -> str:
    """The user's head: the longest end of both that begins with a special token and leaves the turn before it a tail.

    The longest end of both where there is none.
    """
    longest = _common_start(begin[::-1], next_turn[::-1])[::-1]
    ends = [longest[place:] for place in range(len(longest) + 1)]
    whole = [end for end in ends if not any(_cuts(text, len(end), special) for text in (begin, next_turn))]
    fitting = [end for end in whole if len(end) < len(next_turn) and any(end.startswith(t) for t in special if t)]
    return (fitting or whole)[0]


def _cuts(text: str, length: int, special: Sequence[str]) -> bool:
    """Whether the last `length` letters of a text begin inside a special token."""
    place = len(text) - length
    return any(token in text[max(0, place - len(token) + 1) : place + len(token) - 1] for token in special if token)


def go_template(turns: Turns) -> str:
    """The turns as Go's text/template, over Ollama's `.System` and `.Messages`."""
    (user, user_end), (assistant, assistant_end) = turns.user, turns.assistant
    begin, inside = turns.begin, ""
    if turns.system is not None and turns.in_first_user:
        inside = f"{{{{ if and $.System (eq $i 1) }}}}{{{{ $.System }}}}{turns.system[1]}{{{{ end }}}}"
    elif turns.system is not None:
        before, behind = turns.system
        begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{turns.begin}{{{{ end }}}}"
    return (
        f"{begin}{{{{ range $i, $m := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{user}{inside}{{{{ .Content }}}}{user_end}'
        f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ .Content }}}}{assistant_end}{{{{ end }}}}'
        f"{{{{ end }}}}{turns.answer}"
    )


def modelfile(
    model: str,
    template: Turns | str,
    stops: Sequence[str],
    parameters: Mapping[str, object],
    adapter: str | None = None,
) -> str:
    """The text of a Modelfile. `model`: a file or a name; `template`: turns, or the reason why there are none."""
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines += [
            "# FROM has to be the adapter's own base: a GGUF of it, or Ollama's name for it.",
            f"ADAPTER {adapter}",
        ]
    if isinstance(template, str):
        lines.append(f"# No TEMPLATE: {template}. Ollama falls back on the template in the GGUF file.")
    else:
        lines += ["# Checked against the template of training by rendering both; Go itself was not run."]
        lines.append(f'TEMPLATE """{go_template(template)}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
