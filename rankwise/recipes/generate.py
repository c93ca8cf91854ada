"""Try it: answers to prompts, and a conversation, rendered exactly as training rendered them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rankwise.attach.inject import disabled
from rankwise.data.formats import ASSISTANT, SYSTEM, USER, Turn
from rankwise.data.templates import render_prompt, stop_token_ids, template_for
from rankwise.errors import RequestError
from rankwise.evaluate.generate import generate_answers
from rankwise.recipes.target import Opened, find_target, need_task, open_target

ANSWERING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types of models that write."""


@dataclass(frozen=True)
class Session:
    """A loaded target that answers."""

    opened: Opened

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.opened.model.device

    def answer_all(self, prompts: Sequence[str], system: str | None, max_new_tokens: int, batch_size: int) -> list[str]:
        """The greedy answer to each prompt.

        Raises: RequestError for an empty prompt, or one that does not fit into the model.
        """
        conversations: list[list[Turn]] = []
        for place, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise RequestError(f"prompt {place} is empty; give a text")
            conversations.append([*_system(system), Turn(USER, prompt)])
        return self.continue_all(conversations, max_new_tokens, batch_size)

    def continue_all(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int, batch_size: int) -> list[str]:
        """The assistant's next turn of each conversation. Raises: RequestError, as `answer_all`."""
        data = self.opened.target.data_config()
        tokenizer = self.opened.tokenizer
        layout = self.opened.target.needs.layout
        ids = [render_prompt(tokenizer, turns, data, layout)[1] for turns in conversations]
        stops = stop_token_ids(tokenizer, data, layout)
        progress = len(ids) > batch_size
        return generate_answers(self.opened.model, tokenizer, ids, max_new_tokens, batch_size, progress, stops)


@dataclass
class Conversation:
    """Turns so far, and whether the adapter takes part."""

    session: Session
    system: str | None
    max_new_tokens: int
    turns: list[Turn] = field(default_factory=list)
    base_alone: bool = False

    def __post_init__(self) -> None:
        self.reset()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as messages."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.turns = _system(self.system)

    def toggle_base(self) -> bool:
        """Switches the adapter off or on again; whether the base is alone now.

        Raises: RequestError for a target without an adapter.
        """
        if self.session.opened.target.adapter is None:
            raise RequestError(f"'{self.session.opened.target.name}' has no adapter to switch off")
        self.base_alone = not self.base_alone
        return self.base_alone

    def say(self, text: str) -> str:
        """The answer to `text`, which then belongs to the conversation; after an error nothing is remembered.

        Raises: RequestError when the conversation no longer fits into the model.
        """
        turns = [*self.turns, Turn(USER, text)]
        alone = disabled(self.session.opened.model) if self.base_alone else contextlib.nullcontext()
        with alone:
            answer = self.session.continue_all([turns], self.max_new_tokens, 1)[0]
        self.turns = [*turns, Turn(ASSISTANT, answer)]
        return answer


def open_session(
    target: str,
    base: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    chat_template: str | None = None,
    task: str | None = None,
) -> Session:
    """Loads a run, adapter or model, and says which template was chosen where there is none. `task`: of a gate's.

    Raises: RequestError for what can't be loaded.
    """
    found = find_target(target, base, device, chat_template, task)
    need_task(found)
    if found.needs.task_type not in ANSWERING:
        raise RequestError(
            f"'{target}' is for {found.objective} and writes no answers; measure it with `rankwise evaluate {target} "
            "--data FILE`"
        )
    opened = open_target(found, precision)
    for note in template_for(opened.tokenizer, opened.target.data_config(), opened.target.needs.layout).notes:
        print(f"note: {note}", file=sys.stderr)
    return Session(opened)


def _system(text: str | None) -> list[Turn]:
    return [] if text is None else [Turn(SYSTEM, text)]
