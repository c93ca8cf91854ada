"""How a row becomes token sequences: one text for a conversation, several where an objective keeps them apart.

The loader tokenises each text and lays the sequences end to end in an `Example`, whose `parts` are their lengths. So
packing, storage and previews treat all objectives alike, and `collate` of an objective cuts them apart again.
"""

from __future__ import annotations

from collections.abc import Callable

from rankwise.data.config import PREFERENCE, SEQ2SEQ, WHOLE
from rankwise.data.fields import RowError
from rankwise.data.plain_template import Rendered, Template
from rankwise.data.preferences import both, first
from rankwise.data.rows import Row

Layout = Callable[[Row, Template], tuple[Rendered, ...]]
"""Writes a row by a template: one text for each sequence. Raises: as `Template.render`."""


def _whole(row: Row, template: Template) -> tuple[Rendered, ...]:
    return (template.render(first(row.turns)),)  # of a preference pair the chosen answer


def _question_and_answer(row: Row, template: Template) -> tuple[Rendered, ...]:
    answer = template.render(row.turns)
    return Rendered(answer.prompt, (), answer.prompt), answer


def _chosen_and_rejected(row: Row, template: Template) -> tuple[Rendered, ...]:
    chosen, rejected = (template.render(turns) for turns in both(row.turns))
    prompts = {rendered.text[: rendered.spans[0][0]] for rendered in (chosen, rejected)}
    if len(prompts) > 1:
        raise RowError("the template writes another prompt before the chosen answer than before the rejected one")
    return chosen, rejected


LAYOUTS: dict[str, Layout] = {
    WHOLE: _whole,  # the conversation or the text, in one sequence
    SEQ2SEQ: _question_and_answer,  # for the encoder and for the decoder
    PREFERENCE: _chosen_and_rejected,  # the prompt with each answer
}
