"""What a row becomes."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.data.plain_template import Span
from rankwise.models.batch import IGNORED


@dataclass(frozen=True)
class Example:
    """One row, ready for training and evaluation.

    Args:
        input_ids: the tokens, at most `max_length` (of each part).
        labels: of the same length: a token's own id where it is trained on, else IGNORED.
        text: what the tokens say (cut where they were cut).
        spans: the trained [start, end) characters of `text`, as the labels have them.
        prompt_ids: from which the last answer is generated; empty for rows of plain text. Never cut.
        prompt_text: the last user turn as written.
        answer: the last answer as written.
        source: what the baseline `copy` answers: `prompt_text` without the file's shared instruction.
        file, line: where the row stands.
        parts: lengths of the sequences that lie end to end in `input_ids`, where the objective's layout has several
            (question and answer; chosen and rejected; anchor, positive and negatives); empty: it is one sequence. Each
            has at most `max_length` tokens.
        targets: what a head is to say, in place of labels: a class, or 0 or 1 for each class, or a class for each token
            or IGNORED; of texts to be compared 0, the place of the right one among the row's own candidates.
        weights: runs of tokens that count other than once in the loss, each (first, behind the last, weight).
        task: the name of its task, where a run has several.
        token_type_ids: which of two texts a token belongs to, for models that read it; else empty.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    prompt_ids: tuple[int, ...]
    prompt_text: str
    answer: str
    source: str = ""
    file: str = ""
    line: int = 0
    parts: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    token_type_ids: tuple[int, ...] = ()
    weights: tuple[tuple[int, int, float], ...] = ()
    task: str = ""

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence: what a model's positions must hold."""
        return max(self.parts, default=len(self.input_ids))

    @property
    def num_trained(self) -> int:
        """Targets, or labels that an earlier token predicts: the first position's does not count."""
        if self.targets:
            return len(self.targets) - self.targets.count(IGNORED)
        labels = self.labels
        return len(labels) - labels.count(IGNORED) - (len(labels) > 0 and labels[0] != IGNORED)
