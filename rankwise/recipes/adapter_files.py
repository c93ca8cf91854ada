"""PEFT's two files, and what lies beside them, written from tensors: for those who make an adapter without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from rankwise.attach import peft_format


def write_adapter(
    folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], beside: Mapping[str, Any]
) -> None:
    """Writes an adapter into a folder that is there, usually a temporary one.

    Args:
        folder: to write into.
        fields: the content of `adapter_config.json`.
        tensors: by names relative to the model.
        beside: the content of other JSON files by their names; None where there is none.
    """
    weights = save(peft_format.to_file(tensors), metadata={"format": "pt"})
    (folder / peft_format.WEIGHTS_FILE).write_bytes(weights)
    config = json.dumps(fields, indent=2, sort_keys=True)
    (folder / peft_format.CONFIG_FILE).write_text(config, encoding="utf-8")
    for name, content in beside.items():
        if content is not None:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
