"""What an export wrote and how it compares with the model in torch: one row for each artefact, in `export_report.json`.

What could not be run is said to be not run; a row past one of its bounds ends the export, and nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import WorkError
from rankwise.export.certificate import Difference

REPORT_FILE = "export_report.json"


@dataclass(frozen=True)
class Row:
    """One artefact, compared with the model in torch with its adapter.

    Args:
        artifact: the file or folder, relative to the output folder.
        bytes: its size on disk.
        ran: whether it was loaded again and computed something; False is printed as "not run".
        max_abs_diff, mean_abs_diff: of the logits; None where nothing was compared.
        kl: mean KL(torch || artefact), nats a token.
        top1_agreement: share of positions with the same first choice.
        speedup: torch's time over the artefact's, on the same prompts; None where it was not timed.
        note: what a reader has to know: by what it was run, and what was not checked.
        bounds: field of this row to the largest value it may have.
        more: further figures, by name; they stand in the report's row beside the others.
    """

    artifact: str
    bytes: int
    ran: bool
    max_abs_diff: float | None = None
    mean_abs_diff: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    speedup: float | None = None
    note: str = ""
    bounds: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        fields = asdict(self)
        more = fields.pop("more")
        return {**fields, **more}


def compared_row(artifact: str, num_bytes: int, difference: Difference, **more: Any) -> Row:
    """The row of an artefact that ran, and differs by `difference`; `more` are further fields of the row."""
    return Row(
        artifact, num_bytes, ran=True, max_abs_diff=difference.max_abs_diff, mean_abs_diff=difference.mean_abs_diff,
        kl=difference.kl, top1_agreement=difference.top1_agreement, **more,
    )  # fmt: skip


def check_bounds(rows: Sequence[Row], remedy: str) -> None:
    """Raises: WorkError for a figure that is past its row's bound, or no number, with the remedy."""
    for row in rows:
        for name, bound in row.bounds.items():
            value = row.to_dict()[name]
            if value is None or math.isnan(value) or value > bound:
                raise WorkError(
                    f"'{row.artifact}' differs from the model in torch: {name} {_text(value)}, above the bound "
                    f"{bound:g}; nothing was kept; {remedy}"
                )


def _text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def size_of(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
