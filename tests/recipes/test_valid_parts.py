"""The validation loss of each source, and of each validation file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.evaluate.perplexity import Likelihood, together
from rankwise.recipes.finetune import train
from tests.recipes.runs import metrics, settings
from tests.recipes.test_finetune_data import rows
from tests.train.rows import write_rows

SHORT = {"steps": 2, "samples": None, "sample_tokens": None, "evaluate_every": 2}


def valid_losses(output: Path) -> dict[str, float]:
    return {name: value for name, value in metrics(output)[-1].items() if name.startswith("valid_loss")}


def test_each_file_and_all_of_them(files, tmp_path) -> None:
    other = write_rows(tmp_path / "other.jsonl", 3, seed=2)
    both = [str(files / "valid.jsonl"), str(other)]
    found = {}
    for name, valid in {"both": both, "valid": both[0], "other": both[1]}.items():
        train(settings(files, tmp_path / name, data={"valid": valid}, train=SHORT), quiet=True)
        found[name] = valid_losses(tmp_path / name)
    assert set(found["both"]) == {"valid_loss", "valid_loss/valid", "valid_loss/other"}
    assert set(found["valid"]) == set(found["other"]) == {"valid_loss"}
    for name in ("valid", "other"):
        assert found["both"][f"valid_loss/{name}"] == found[name]["valid_loss"]
    parts = sorted(found["both"][f"valid_loss/{name}"] for name in ("valid", "other"))
    assert parts[0] < found["both"]["valid_loss"] < parts[1]


def test_held_out_rows_of_each_source(files, tmp_path) -> None:
    sources = [{"path": rows(tmp_path / "a.jsonl", 60), "epochs": 2}, {"path": rows(tmp_path / "b.jsonl", 90, "line")}]
    run = settings(files, tmp_path / "out", data={"train": sources, "valid": None, "valid_split": 0.2}, train=SHORT)
    train(run, quiet=True)
    assert set(valid_losses(tmp_path / "out")) == {"valid_loss", "valid_loss/a", "valid_loss/b"}


def test_files_of_one_name_are_told_apart_by_their_paths(files, tmp_path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(str(write_rows(tmp_path / folder / "rows.jsonl", 3)))
    train(settings(files, tmp_path / "out", data={"valid": paths}, train=SHORT), quiet=True)
    assert set(valid_losses(tmp_path / "out")) == {"valid_loss", *(f"valid_loss/{path}" for path in paths)}


def test_parts_together_are_the_mean_over_all_rows() -> None:
    one = Likelihood(2.0, 4, 2, {"accuracy": 0.5}, 4.0, {"accuracy": 2.0})
    two = Likelihood(1.0, 12, 3, {"accuracy": 1.0}, 6.0, {"accuracy": 3.0})
    whole = together([one, two])
    assert (whole.loss, whole.num_units, whole.num_examples, whole.weight) == (pytest.approx(1.4), 16, 5, 10.0)
    assert whole.figures == {"accuracy": pytest.approx(0.8)}
