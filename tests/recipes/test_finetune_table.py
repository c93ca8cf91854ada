"""The table of docs/distributed.md: what 2 and 4 processes differ by from one, over 20 steps. `pytest -m slow -s`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.recipes.finetune import train
from tests import tiny
from tests.processes import Processes
from tests.recipes.test_finetune_processes import TOLERANCE, largest_difference, run_of, train_here

BASES = {"untied": {}, "tied": {"name": "tied"}, "8bit": {"quantization": "8bit"}, "4bit": {"quantization": "4bit"}}
ADAPTERS = {"lora": {}, "dora": {"use_dora": True}}
WAYS = {
    "packed": {},
    "padded, recomputed": {"data": {"packing": False}, "train": {"gradient_checkpointing": True}},
    "optimizer shared": {"train": {"share_optimizer_from": 1}},
    "8-bit optimizer shared": {"train": {"share_optimizer_from": 1, "optimizer": "adamw-8bit"}},
}


@pytest.fixture(scope="module")
def models(files: Path) -> Path:
    tiny.llama(tied=True).save_pretrained(files / "tied")
    tiny.tiny_tokenizer().save_pretrained(files / "tied")
    return files


@pytest.fixture(scope="module", params=[2, 4])
def many(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(request.param)
    yield processes
    processes.stop()


def _on_machines_of_two(run: dict[str, Any]) -> dict[str, Any] | str:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return train_here(run)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "adapter", "way"), itertools.product(BASES, ADAPTERS, WAYS))
def test_one_process_and_many(base: str, adapter: str, way: str, models: Path, tmp_path: Path, many: Processes) -> None:
    case: dict[str, Any] = {"model": BASES[base], "adapter": ADAPTERS[adapter], **WAYS[way]}
    train(run_of(models, tmp_path / "one", case), quiet=True)
    count = many.count
    ways = () if "bit" in base else ("full",) if count == 2 else ("full", "node")
    for sharding in ("none", *ways):
        output = tmp_path / sharding
        many(_on_machines_of_two, run_of(models, output, case, sharding=sharding))
        found = largest_difference(output, tmp_path / "one")
        print(f"| {count} | {base} | {adapter} | {way} | {sharding} | {found:.1e} |")
        assert found < TOLERANCE
