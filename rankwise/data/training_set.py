"""The training set: its sources one after another, and the rows that are held out of them for validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankwise.data.config import AUTO, BY_HASH, BY_ROW, DataConfig, Source
from rankwise.data.loaded import Loaded
from rankwise.data.loader import Check, load_split
from rankwise.data.mixing import quotas
from rankwise.data.rows import Problem
from rankwise.data.splits import auto_rows, held_out_by_key, held_out_by_row
from rankwise.data.store import Examples
from rankwise.errors import RequestError, counted
from rankwise.models.labels import Labels
from rankwise.say import Say


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on. `sizes`, `quotas`: rows of each source, and how many of them an epoch of the mix draws.

    `held_sizes`: rows of each source that are held out; they lie in this order.
    """

    train: Loaded
    held_out: Loaded | None
    """Rows for validation, where there is no file of them."""
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    held_sizes: tuple[int, ...] = ()

    def per_epoch(self, name: str) -> int:
        """The sum of a column of the examples' index over an epoch of the mix: on average, where it takes only some."""
        column, total, start = self.train.examples.column(name), 0.0, 0
        for size, quota in zip(self.sizes, self.quotas, strict=True):
            total += int(column[start : start + size].sum()) * (quota / max(size, 1))
            start += size
        return round(total)

    @property
    def is_mix(self) -> bool:
        """Whether some source is drawn from more or less often than once an epoch."""
        return self.sizes != self.quotas


def load_sources(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    layout: str,
    say: Say,
    check: Check | None,
    labels: Labels | None = None,
) -> list[tuple[Loaded, list[Problem]]]:
    """`load_split` of each source of `data.train`, with its arguments, and what it raises."""
    found: list[tuple[Loaded, list[Problem]]] = []
    for source in config.sources:
        settings = config.for_files(source.path, source.format, source.columns)
        if config.group_column is not None:
            settings = dataclasses.replace(settings, split_by=config.group_column)
        found.append(load_split(source.path, tokenizer, settings, layout, say, check, labels))
    return found


def training_set(config: DataConfig, parts: Sequence[Loaded], hold_out: bool) -> TrainingSet:
    """The sources' rows in one, without those held out.

    Args:
        config: the run's data section.
        parts: what `load_sources` gave of each, as it was accepted.
        hold_out: whether rows are held out at all, as `data.valid_split` says.

    Raises: RequestError when nothing is left to train on, or nothing could be held out where it was asked for.
    """
    whole = joined(parts, config.sources)
    examples = whole.examples
    ends = np.cumsum([0, *(len(part.examples) for part in parts)])
    held = held_out(config, examples) if hold_out else np.zeros(len(examples), dtype=bool)
    train, valid = whole, None
    if held.any():
        kept = examples.at(np.flatnonzero(~held))
        train = dataclasses.replace(whole, examples=kept, num_rows=whole.num_rows - int(held.sum()))
        rows = examples.at(np.flatnonzero(held))
        valid = Loaded(rows, whole.format, whole.why, len(rows), 0)
    sizes = tuple(int((~held[start:end]).sum()) for start, end in pairwise(ends))
    for source, size, part in zip(config.sources, sizes, parts, strict=True):
        if size == 0 and held.any():
            raise RequestError(
                f"data.valid_split ({config.valid_split}) leaves no row of '{source.name}' to train on, of "
                f"{counted(len(part.examples), 'row')}; hold fewer out, or give a file in data.valid"
            )
    drawn = quotas(
        sizes,
        [source.weight for source in config.sources],
        [source.epochs for source in config.sources],
        config.mixing_temperature,
    )
    names = tuple(source.name for source in config.sources)
    held_sizes = tuple(int(held[start:end].sum()) for start, end in pairwise(ends))
    return TrainingSet(train, valid, names, sizes, tuple(drawn), held_sizes)


def held_out(config: DataConfig, examples: Examples) -> np.ndarray:
    """Which examples are held out, [n] booleans, as `data.valid_split` and `data.split_by` say.

    Raises: RequestError when a split that was asked for holds no row out.
    """
    amount = auto_rows(len(examples)) if config.valid_split == AUTO else config.valid_split
    assert not isinstance(amount, str)
    if not amount:
        return np.zeros(len(examples), dtype=bool)
    if config.split_by == BY_ROW:
        held = held_out_by_row(len(examples), amount)
    else:
        held = held_out_by_key(examples.column("key" if config.split_by == BY_HASH else "group"), amount)
    if not held.any():
        groups = len(np.unique(examples.column("group"))) if config.group_column else 0
        of = counted(groups, f"value of '{config.group_column}'") if groups else counted(len(examples), "row")
        raise RequestError(
            f"data.valid_split ({config.valid_split}) holds no row out of {of}; ask for more, or for a number of rows"
        )
    return held


def joined(parts: Sequence[Loaded], sources: Sequence[Source]) -> Loaded:
    """Several sources as one, in their order; what is said of one of several begins with its name."""
    if len(parts) == 1:
        return parts[0]
    stores = [store for part in parts for store in part.examples.stores]
    named = list(zip(sources, parts, strict=True))
    return Loaded(
        examples=Examples(stores),
        format=", ".join(dict.fromkeys(name for part in parts for name in part.format.split(", ") if name)),
        why="; ".join(part.why for part in parts if part.why),
        num_rows=sum(part.num_rows for part in parts),
        num_truncated=sum(part.num_truncated for part in parts),
        num_emptied=sum(part.num_emptied for part in parts),
        num_skipped=sum(part.num_skipped for part in parts),
        notes=tuple(f"{source.name}: {note}" for source, part in named for note in part.notes),
        warnings=tuple(f"{source.name}: {text}" for source, part in named for text in part.warnings),
        how="; ".join(f"{source.name}: {part.how}" for source, part in named if part.how),
    )
