"""The rank map: of names, in text, as a picture, over time; what vLLM must be told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import attach
from rankwise.cli import main as cli
from rankwise.errors import RequestError
from rankwise.recipes.inspect import inspect_adapter
from rankwise.recipes.rank_map import rank_history, rank_map, text_history, text_map, vllm_max_lora_rank
from tests import tiny

RANKS = {"h.0.attn.q": 4, "h.10.attn.q": 16, "h.2.attn.q": 8, "h.2.mlp.up": 1, "embed": 2}


def test_blocks_by_number_and_modules():
    found = rank_map(RANKS)
    assert found.blocks == ["", "h.0", "h.2", "h.10"] and found.modules == ["attn.q", "embed", "mlp.up"]
    assert found.ranks["h.10", "attn.q"] == found.highest == 16 and found.ranks["", "embed"] == 2


def test_as_text():
    lines = text_map(rank_map(RANKS))
    assert lines[0].split() == ["a", "b", "c"] and lines[-3:] == ["a attn.q", "b embed", "c mlp.up"]
    assert lines[3].split()[0] == "h.2" and lines[4].split() == ["h.10", "16█", "·", "·"]
    assert len({len(line) for line in lines[:5]}) == 1


def test_history_of_a_run(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "ranks": {"a": 1, "b": 2}}, {"step": 4, "ranks": {"a": 1, "b": 6}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = rank_history(tmp_path)
    assert [entry["step"] for entry in history] == [2, 4] and history[1]["ranks"]["b"] == 6
    assert text_history(history)[1] == "step      4: 7 ranks in 2 layers, from 1 to 6; 1 changed"
    assert rank_history(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(RequestError, match=r"metrics\.jsonl', line 2, is not a line"):
        rank_history(tmp_path)


@pytest.mark.parametrize(
    ("highest", "wanted"), [(1, 1), (2, 8), (8, 8), (9, 16), (200, 256), (300, 320), (512, 512), (513, None)]
)
def test_vllm(highest, wanted):
    assert vllm_max_lora_rank(highest) == wanted


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command_draws_it(suffix, tmp_path, capsys):
    ranks = {"layers.1.mlp.up_proj": 20}
    save_adapter(attach(tiny.llama(), LoraConfig(r=4, rank_pattern=ranks)), tmp_path / "adapter")
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "ranks": {"layers.0.q": 4}}) + "\n")
    picture = tmp_path / f"map.{suffix}"
    picture.write_bytes(b"an older one")
    assert cli.main(["inspect", str(tmp_path), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "20█" in text and "step      3: 4 ranks in 1 layer," in text and "--max-lora-rank 32" in text
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_pictures_that_can_not_be_drawn(tmp_path: Path):
    save_adapter(attach(tiny.llama(), LoraConfig(r=4)), tmp_path / "adapter")
    with pytest.raises(RequestError, match=r"must end in \.png or \.svg"):
        inspect_adapter(str(tmp_path / "adapter"), tmp_path / "map.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="can't be made"):
        inspect_adapter(str(tmp_path / "adapter"), tmp_path / "file" / "map.png")
