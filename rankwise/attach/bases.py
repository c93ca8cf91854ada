"""Whether adapters are of one base, and of this one: by the hashes of its weight files in the provenance of their runs.

`provenance.json` stands beside a run's `adapter/`. An adapter from elsewhere has none; then nothing can be said of it,
and that is said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.errors import RequestError
from rankwise.files import sha256_file
from rankwise.say import to_stderr

PROVENANCE_FILE, CHECKPOINTS = "provenance.json", "checkpoints"
"""In a run's folder, as recipes name them."""
SHOWN_DIGITS = 12
"""Of a hash, in a message."""


def base_record(folder: Path) -> dict[str, Any] | None:
    """What the provenance says of the base of an adapter: beside its files, of its run, or of its checkpoint's run.

    None where there is no provenance. Raises: RequestError for one that can't be read.
    """
    above = folder.expanduser().absolute().parents
    places = [folder.expanduser(), above[0]]
    if len(above) > 1 and above[0].name == "adapter":  # one of several, in their run's folder
        places.append(above[1])
    places += [above[place + 1] for place in (1, 2) if len(above) > place + 1 and above[place].name == CHECKPOINTS]
    file = next((place / PROVENANCE_FILE for place in places if (place / PROVENANCE_FILE).is_file()), None)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"'{file}' can't be read: {error}") from None
    base = found.get("base") if isinstance(found, dict) else None
    return base if isinstance(base, dict) else None


def weight_hashes(record: Mapping[str, Any] | None) -> dict[str, str]:
    """The hashes of a base's weight files by name; empty where they are not known."""
    files = (record or {}).get("files")
    if not isinstance(files, Mapping):
        return {}
    return {str(name): str(file["sha256"]) for name, file in files.items() if str(name).endswith(".safetensors")}


def model_weight_hashes(model: nn.Module) -> dict[str, str]:
    """Those of the folder that a model was loaded from; empty where it comes from none."""
    name = getattr(model, "name_or_path", "")
    if not name or not Path(name).is_dir():
        return {}
    return {file.name: _hash(file, *file.stat()[6:9]) for file in sorted(Path(name).glob("*.safetensors"))}


@cache
def _hash(file: Path, *state: float) -> str:
    """Read once for each state (size and times) of the file."""
    return sha256_file(file)


def check_base(what: str, record: Mapping[str, Any] | None, own: Mapping[str, str], of: str = "this model") -> None:
    """`what` names an adapter in messages, `own` are the hashes of what `of` names.

    Raises: RequestError when the adapter is known to be of another base.
    """
    theirs = weight_hashes(record)
    if record is not None and theirs and own and theirs != own:
        raise RequestError(
            f"{what} was trained on another base, {record.get('name')} "
            f"(sha256 {next(iter(theirs.values()))[:SHOWN_DIGITS]}), than {of} "
            f"(sha256 {next(iter(own.values()))[:SHOWN_DIGITS]}); use adapters of one base"
        )


def check_bases(
    adapters: Mapping[str, object], own: Callable[[], Mapping[str, str]], say: Callable[[str], None] = to_stderr
) -> None:
    """Whether adapters are of the model that they are put into, or of one base where that can't be known of it.

    Args:
        adapters: folders by name; those that are settings of a fresh adapter are passed over.
        own: gives the hashes of the model; called where an adapter's are known.
        say: is told once which adapters have no provenance.

    Raises: RequestError for one of another base.
    """
    folders = {name: Path(one) for name, one in adapters.items() if isinstance(one, (str, os.PathLike))}
    records = {name: base_record(folder) for name, folder in folders.items()}
    known = {name: record for name, record in records.items() if weight_hashes(record)}
    wanted, of = own() if known else {}, "this model"
    for name, record in known.items():
        what = f"adapter '{name}'"
        if not wanted:
            wanted, of = weight_hashes(record), what
        check_base(f"{what} ('{folders[name]}')", record, wanted, of)
    unknown = [name for name in folders if name not in known]
    if unknown:
        subject = f"adapter {unknown[0]} was" if len(unknown) == 1 else f"adapters {', '.join(unknown)} were"
        say(
            f"note: nothing tells which base {subject} trained on (no {PROVENANCE_FILE} beside or above); taken to be "
            "this model"
        )
