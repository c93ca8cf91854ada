"""Padded and packed batches of the same examples."""

import torch

from rankwise.models.batch import IGNORED, Batch

PAD = 259


def rows_of(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random rows (ids, labels); the first third of each is a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 256, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = IGNORED
        rows.append((ids, labels))
    return rows


def packed(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    lengths = tuple(len(ids) for ids, _ in rows)
    return Batch(
        input_ids=torch.cat([ids for ids, _ in rows])[None],
        labels=torch.cat([labels for _, labels in rows])[None],
        example_index=torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
        num_examples=len(rows),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        segment_lengths=lengths,
    )


def padded(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    longest = max(len(ids) for ids, _ in rows)

    def fill(values: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, longest - len(values)), value=value)

    return Batch(
        input_ids=torch.stack([fill(ids, PAD) for ids, _ in rows]),
        labels=torch.stack([fill(labels, IGNORED) for _, labels in rows]),
        example_index=torch.arange(len(rows))[:, None].expand(-1, longest).contiguous(),
        num_examples=len(rows),
        attention_mask=torch.stack([fill(torch.ones_like(ids), 0) for ids, _ in rows]),
    )
