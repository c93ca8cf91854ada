"""What `rankwise export --to` can write, which settings each format has, and the package that it needs.

Known without torch, so that a command line can be refused before anything is loaded. To add a format: a line here, and
one in `rankwise.recipes.export.WRITERS` that says how it is written and checked.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import RequestError, WorkError, did_you_mean

MEGABYTE = 10**6
SPARE_BYTES = 16 * MEGABYTE
"""Room for configuration, tokenizer and report beside the weights."""


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        summary: what comes out, in one line.
        settings: its settings with their defaults; None where the default depends on the model.
        choices: for those settings that have only a few values.
        package: the module that has to be installed, if any.
        install: the command that installs it.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    package: str | None = None
    install: str = ""


FORMATS: dict[str, Format] = {
    "merged": Format(
        "a Hugging Face model folder, the adapter folded in",
        settings={"dtype": None, "max_shard_size": "5GB"},
        choices={"dtype": ("fp32", "bf16", "fp16")},
    ),
    "onnx": Format(
        "an ONNX graph for ONNX Runtime, its adapters beside it to be switched",
        settings={"merged": False, "adapters": None, "int8": None, "int4": False, "max_kl": None},
        choices={"int8": ("weights", "full")},
        package="onnxruntime",
        install="pip install 'rankwise[onnx]'",
    ),
    "gguf": Format(
        "a GGUF file for llama.cpp and Ollama, the adapter folded in",
        settings={"dtype": "f16"},
        choices={"dtype": ("f32", "f16", "q8_0")},
        package="gguf",
        install="pip install 'rankwise[gguf]'",
    ),
    "gguf-lora": Format(
        "the adapter alone as a GGUF file, which llama.cpp loads beside its base",
        package="gguf",
        install="pip install 'rankwise[gguf]'",
    ),
    "tensorrt": Format(
        "an engine of TensorRT for RTX, built without a GPU and not run",
        settings={
            "dtype": "fp16",
            "merged": False,
            "int8": None,
            "max_kl": None,
            "max_rows": 8,
            "max_context": None,
            "max_rank": None,
        },
        choices={"dtype": ("fp32", "fp16", "bf16"), "int8": ("weights", "full")},
        package="tensorrt_rtx",
        install="pip install 'rankwise[tensorrt]'",
    ),
}
"""By the name that `--to` takes."""


def flag(setting: str) -> str:
    """The command line's name for a setting."""
    return "--" + setting.replace("_", "-")


def known_format(name: str) -> Format:
    """The format of that name. Raises: RequestError for one that is not there."""
    if name not in FORMATS:
        raise RequestError(f"unknown format '{name}'{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def settled(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the format `name`: those given, and the defaults of the others.

    Raises: RequestError for a setting that the format does not have, or a value that is none of its choices.
    """
    chosen = known_format(name)
    for setting in given:
        if setting not in chosen.settings:
            able = [other for other, format in FORMATS.items() if setting in format.settings]
            whose = f"it belongs to --to {', '.join(able)}" if able else "no format has it"
            raise RequestError(f"{flag(setting)} has no effect with --to {name}: {whose}; leave it out")
    for setting, choices in chosen.choices.items():
        value = given.get(setting)
        if value is not None and value not in choices:
            raise RequestError(
                f"{flag(setting)} '{value}' is unknown for --to {name}{did_you_mean(str(value), choices)}"
            )
    return {**chosen.settings, **given}


def need_package(name: str) -> None:
    """Raises: RequestError, with the command that installs it, when the format's package is missing."""
    chosen = known_format(name)
    if chosen.package is not None:
        need_module(chosen.package, name, chosen.install)


def need_module(module: str, name: str, install: str) -> None:
    """As `need_package`, for a further module that the format `name` needs."""
    if importlib.util.find_spec(module) is None:
        raise RequestError(f"--to {name} needs the package {module}, which is not installed: {install}")


def need_space(out: str | Path, num_bytes: int) -> None:
    """Raises: WorkError when the disk of the folder `out`, which may not be there yet, has less room than that."""
    place = Path(out).absolute()
    while not place.is_dir():
        place = place.parent
    wanted, free = num_bytes + SPARE_BYTES, shutil.disk_usage(place).free
    if free < wanted:
        raise WorkError(
            f"'{out}' needs about {wanted / MEGABYTE:,.0f} MB, and its disk has {free / MEGABYTE:,.0f} MB free; free "
            "space or choose another folder"
        )
