"""How a row becomes token sequences: one text for a conversation, several where an objective keeps them apart.

The loader tokenises each text and lays the sequences end to end in an `Example`, whose `parts` are their lengths. So
packing, storage and previews treat all objectives alike, and `collate` of an objective cuts them apart again.
"""

from __future__ import annotations

from collections.abc import Callable

from rankwise.data.config import SEQ2SEQ, WHOLE
from rankwise.data.plain_template import Rendered, Template
from rankwise.data.rows import Row

Layout = Callable[[Row, Template], tuple[Rendered, ...]]
"""Writes a row by a template: one text for each sequence. Raises: as `Template.render`."""


def _whole(row: Row, template: Template) -> tuple[Rendered, ...]:
    return (template.render(row.turns),)


def _question_and_answer(row: Row, template: Template) -> tuple[Rendered, ...]:
    answer = template.render(row.turns)
    return Rendered(answer.prompt, (), answer.prompt), answer


LAYOUTS: dict[str, Layout] = {
    WHOLE: _whole,  # the conversation or the text, in one sequence
    SEQ2SEQ: _question_and_answer,  # for the encoder and for the decoder
}
