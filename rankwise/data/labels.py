"""The labels of rows: which there are, in which order, and how often. Found in a pass of its own, before encoding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.data.config import DataConfig, Reading
from rankwise.data.fields import LABEL, LABELLED, TAG, TAGGED
from rankwise.data.formats import FORMATS
from rankwise.data.rows import Findings, Row, iter_rows
from rankwise.errors import RequestError
from rankwise.models.labels import Labels

MULTI_FORMAT = "labels"
"""The format whose rows may have any number of labels."""
IMBALANCE = 10
"""A label is called rare when the most frequent one is at least so many times as frequent."""
_SHOWN = 5


@dataclass(frozen=True)
class Survey:
    """What a pass over files found: `formats`, and how many rows (or words) have each label.

    Labels are in their order: names by the alphabet, numbers by size. Of files whose rows have none, only the
    first row was read.
    """

    formats: tuple[str, ...]
    counts: dict[str, int]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the rows."""
        return {FORMATS[name].rows for name in self.formats}


def survey(sources: Sequence[tuple[str | Sequence[str], Reading]]) -> Survey:
    """Reads files for their labels, each with its treatment. Rows that can't be used are left to the loader.

    Raises: RequestError for files that can't be read, or whose format can't be told.
    """
    counts: Counter[str] = Counter()
    formats: dict[str, None] = {}
    for paths, reading in sources:
        found = Findings()
        for item in iter_rows(paths, found, reading):
            if not isinstance(item, Row):
                continue
            counts.update(turn.content for turn in item.turns if turn.role in (LABEL, TAG))
            if not {FORMATS[name].rows for name in found.formats} & {LABELLED, TAGGED}:
                break
        formats |= found.formats
    if all(re.fullmatch(r"-?\d+", name) for name in counts):
        return Survey(tuple(formats), {name: counts[name] for name in sorted(counts, key=int)})
    return Survey(tuple(formats), {name: counts[name] for name in sorted(counts)})


def survey_training(config: DataConfig) -> Survey:
    """As `survey`, of all sources of `data.train`."""
    treated = [(source.path, config.for_files(source.path, source.format, source.columns)) for source in config.sources]
    return survey([(paths, settings.reading) for paths, settings in treated])


def find_labels(config: DataConfig) -> Labels | None:
    """The labels of the training rows; None of rows that have none by their format.

    Raises: RequestError when rows with one label stand beside rows with lists of them.
    """
    return labels_of(survey_training(config))


def labels_of(found: Survey) -> Labels | None:
    """As `find_labels`, of what was found."""
    if not found.formats or not found.kinds <= {LABELLED, TAGGED}:
        return None
    is_multi = MULTI_FORMAT in found.formats
    if is_multi and len(found.formats) > 1:
        raise RequestError(
            f"the training rows have formats {' and '.join(found.formats)}; write all of them with `labels`, or none"
        )
    return Labels(tuple(found.counts), is_multi)


def check_labels(labels: Labels) -> None:
    """Raises: RequestError when there are fewer than two."""
    if len(labels.names) < 2:
        found = f"only the label '{labels.names[0]}'" if labels.names else "no label at all"
        raise RequestError(f"the training rows have {found}: there is nothing to tell apart; at least two are needed")


def imbalance_warning(counts: dict[str, int]) -> str | None:
    """What is said of labels that are much rarer than the most frequent one; None where there are none."""
    if not counts:
        return None
    most = max(counts, key=lambda name: counts[name])
    rare = [f"{name} ({count})" for name, count in counts.items() if count * IMBALANCE <= counts[most]]
    if not rare:
        return None
    more = f" and {len(rare) - _SHOWN} more" if len(rare) > _SHOWN else ""
    return f"rare labels beside {most} ({counts[most]}): {', '.join(rare[:_SHOWN])}{more}"
