"""Small examples and data files: reversing words, one byte a token."""

from __future__ import annotations

import json
import random
from pathlib import Path

from rankwise.data.example import Example
from rankwise.models.batch import IGNORED


def words(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdef") for _ in range(draw.randint(3, longest))) for _ in range(count)]


def example(prompt: str, answer: str) -> Example:
    ids = [*prompt.encode(), *answer.encode()]
    labels = [IGNORED] * len(prompt) + list(answer.encode())
    return Example(
        input_ids=tuple(ids), labels=tuple(labels), text=prompt + answer, spans=((len(prompt), len(prompt + answer)),),
        prompt_ids=tuple(prompt.encode()), prompt_text=prompt, answer=answer,
    )  # fmt: skip


def examples(count: int, seed: int = 0) -> list[Example]:
    return [example(f"{word}>", word[::-1] + ".") for word in words(count, seed)]


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    lines = [json.dumps({"prompt": word, "completion": word[::-1]}) for word in words(count, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path
