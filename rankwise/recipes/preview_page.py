"""The document of `rankwise data preview` as one HTML page: no script, nothing fetched, every text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1d2329; }
table { border-collapse: collapse; } 
td, th { padding: .2rem .8rem; border-bottom: 1px solid #d5dbe1; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.place { color: #66707a; font-size: .85rem; margin: 1.2rem 0 .2rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7f9; padding: .8rem; margin: 0; }
mark { background: #bdecc6; color: inherit; border-radius: 3px; }
li.warning { color: #8a5300; } li.problem { color: #a1121f; }
img { max-width: 100%; }
"""
COUNTS = (
    "rows", "tokens", "trained_tokens", "truncated", "emptied", "duplicates", "near_duplicates", "leaks", "near_leaks",
    "shared_runs", "outliers",
)  # fmt: skip
"""Counts of a split, in the order in which they are shown."""


def page(document: Mapping[str, Any], title: str) -> str:
    """The page as text. `document`: what `rankwise.data.preview.preview` gives, with `packing`."""
    splits: Mapping[str, Any] = document["splits"]
    parts = [f"<h1>{escape(title)}</h1>", _counts(splits), *_sentences(document)]
    if any(split["histogram"]["counts"] for split in splits.values()):
        parts.append(f'<h2>Lengths</h2><img alt="tokens a row" src="{_picture(splits)}">')
    parts.append("<h2>Examples</h2><p>What is trained on is <mark>marked</mark>.</p>")
    for example in document["examples"]:
        place = escape(f"{example['file']}:{example['line']}")
        parts.append(f'<p class="place">{place}</p><pre>{marked(example["text"], example["trained_spans"])}</pre>')
    for kind in ("warnings", "notes"):
        parts.append(_list(kind, document[kind]))
    problems = [f"{problem['file']}:{problem['line']}: {problem['reason']}" for problem in document["problems"]]
    parts.append(_list("problems", problems))
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def marked(text: str, spans: Sequence[Sequence[int]]) -> str:
    """The text as HTML, its trained [start, end) characters marked."""
    pieces, place = [], 0
    for start, end in spans:
        pieces += [escape(text[place:start]), f"<mark>{escape(text[start:end])}</mark>"]
        place = end
    return "".join([*pieces, escape(text[place:])])


def _counts(splits: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in splits)
    lines = [
        f"<tr><td>{name.replace('_', ' ')}</td>"
        + "".join(f"<td>{split[name]:,}</td>" if name in split else "<td></td>" for split in splits.values())
        + "</tr>"
        for name in COUNTS
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _sentences(document: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {split['why']}" for name, split in document["splits"].items()]
    languages = ", ".join(f"{name} {count}" for name, count in document["languages"].items())
    if languages:
        lines.append(f"languages, as guessed: {languages}")
    packing = document["packing"]
    how = "packed" if packing["packs"] else "padded"
    lines.append(
        f"micro batches are {how}: {packing['efficiency']:.1%} of their positions are tokens; padded, "
        f"{packing['padded_efficiency']:.1%} would be"
    )
    return [f"<p>{escape(line)}</p>" for line in lines]


def _list(kind: str, texts: Sequence[str]) -> str:
    if not texts:
        return ""
    items = "".join(f'<li class="{kind[:-1]}">{escape(text)}</li>' for text in texts)
    return f"<h2>{kind.capitalize()}</h2><ul>{items}</ul>"


def _picture(splits: Mapping[str, Any]) -> str:
    """The histograms of lengths as a data URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, split) in enumerate(splits.items()):
        edges, counts = split["histogram"]["edges"], split["histogram"]["counts"]
        if counts:
            total = sum(counts)
            axes.stairs([count / total for count in counts], edges, label=name, fill=place == 0, alpha=0.6)
    axes.set(xlabel="tokens a row", ylabel="share of rows")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, dpi=110, format="png")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode("ascii")
