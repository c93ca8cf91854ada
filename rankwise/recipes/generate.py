"""Try it: answers to prompts, and a conversation, rendered exactly as training rendered them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from typing_extensions import override

from rankwise.attach.inject import disabled
from rankwise.data.formats import ASSISTANT, USER, Turn
from rankwise.data.templates import render_prompt, stop_token_ids, template_for
from rankwise.errors import RequestError
from rankwise.evaluate.generate import generate_answers
from rankwise.recipes.session import Session, opening
from rankwise.recipes.target import Opened, find_target, need_task, open_target

ANSWERING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
"""Task types of models that write."""


@final
@dataclass(frozen=True)
class ModelSession(Session):
    """A target in torch that answers greedily."""

    opened: Opened

    @property
    @override
    def name(self) -> str:
        return self.opened.target.name

    @property
    @override
    def device(self) -> str:
        return str(self.opened.model.device)

    @property
    @override
    def has_adapter(self) -> bool:
        return self.opened.target.adapter is not None

    @override
    def base_alone(self) -> contextlib.AbstractContextManager[None]:
        return disabled(self.opened.model)

    @override
    def continue_all(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int, batch_size: int) -> list[str]:
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
        self.turns = opening(self.system)

    def toggle_base(self) -> bool:
        """Switches the adapter off or on again; whether the base is alone now.

        Raises: RequestError for a target without an adapter.
        """
        if not self.session.has_adapter:
            raise RequestError(f"'{self.session.name}' has no adapter to switch off")
        self.base_alone = not self.base_alone
        return self.base_alone

    def say(self, text: str) -> str:
        """The answer to `text`, which then belongs to the conversation; after an error nothing is remembered.

        Raises: RequestError when the conversation no longer fits into the model.
        """
        turns = [*self.turns, Turn(USER, text)]
        alone = self.session.base_alone() if self.base_alone else contextlib.nullcontext()
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
) -> ModelSession:
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
    return ModelSession(opened)


def open_export(
    folder: str,
    adapter: str | None = None,
    chat_template: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Session:
    """Opens a folder of `rankwise export --to onnx`. `adapter`: one of its names, `base` for none; None takes the only
    one. `sampling`: fields of `rankwise.export.onnx_runtime.Sampling`.

    Raises: RequestError for what can't be opened.
    """
    from rankwise.export.onnx_runtime import Sampling  # the package is needed here only
    from rankwise.recipes.generate_onnx import OnnxSession

    return OnnxSession(folder, adapter, chat_template, Sampling(**(sampling or {})))
