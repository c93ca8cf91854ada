"""What answers, whatever runs it: a model in torch, or an ONNX export."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rankwise.data.formats import SYSTEM, USER, Turn
from rankwise.errors import RequestError


class Session(ABC):
    """A loaded target that answers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The target, as the user wrote it."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the model runs."""

    @property
    @abstractmethod
    def has_adapter(self) -> bool:
        """Whether there is an adapter to switch off."""

    @abstractmethod
    def base_alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block no adapter takes part."""

    @abstractmethod
    def continue_all(self, conversations: Sequence[Sequence[Turn]], max_new_tokens: int, batch_size: int) -> list[str]:
        """The assistant's next turn of each conversation. Raises: RequestError, as `answer_all`."""

    def answer_all(self, prompts: Sequence[str], system: str | None, max_new_tokens: int, batch_size: int) -> list[str]:
        """The answer to each prompt.

        Raises: RequestError for an empty prompt, or one that does not fit into the model.
        """
        conversations: list[list[Turn]] = []
        for place, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise RequestError(f"prompt {place} is empty; give a text")
            conversations.append([*opening(system), Turn(USER, prompt)])
        return self.continue_all(conversations, max_new_tokens, batch_size)


def opening(system: str | None) -> list[Turn]:
    """The turns that a conversation begins with."""
    return [] if system is None else [Turn(SYSTEM, system)]
