"""One cell: every kind trains what it says, and each example's loss is that of the example alone."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from rankwise.errors import RequestError
from rankwise.models.config import ModelConfig
from rankwise.models.load import load_model
from rankwise.recipes.bench_cell import check_cell, run_cell
from rankwise.recipes.bench_measure import short
from rankwise.recipes.convert_rank import convert_rank
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.recipes.run import build_run
from tests import tiny
from tests.recipes.trained import rows, run_document, save_model, write_rows
from tests.train.labelled import OBJECTIVE, write
from tests.train.labelled import rows as labelled_rows


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory):
    """Builds runs on answers, of a tiny Llama."""
    root = tmp_path_factory.mktemp("texts")
    model = save_model(root / "model")
    test = write_rows(root / "test.jsonl", rows(6, first=3))

    def build(precision="fp32", packing=True, **train_settings):
        document = run_document(root, model, **{"steps": 6, "precision": precision, **train_settings})
        document["data"] |= {"test": test, "packing": packing}
        return build_run(document)

    return build


@pytest.fixture(scope="module")
def label_run(tmp_path_factory: pytest.TempPathFactory):
    """A run on labels, of a tiny encoder."""
    root = tmp_path_factory.mktemp("labels")
    tiny.encoder().save_pretrained(root / "model")
    tiny.word_tokenizer().save_pretrained(root / "model")
    files = {split: str(root / f"{split}.jsonl") for split in ("train", "valid", "test")}
    for number, path in enumerate(files.values()):
        write(Path(path), labelled_rows("label", 20 - 5 * number, seed=number))
    return build_run(
        {
            "model": {"name": str(root / "model"), "device": "cpu"},
            "adapter": {"r": 2},
            "data": files,
            "train": {"objective": OBJECTIVE["label"], "steps": 6, "batch_size": 8, "lr": 1e-2, "precision": "fp32"},
        }
    )


def test_an_adapter_cell_is_the_run_that_train_does(text_run, tmp_path):
    run = text_run()
    cell = run_cell(run, "adapter")
    summary = train({**_mapping(run), "output": str(tmp_path / "out")}, quiet=True)
    tokens = zip(cell["losses"]["valid"], cell["units"]["valid"], strict=True)
    mean = sum(loss * count for loss, count in tokens) / sum(cell["units"]["valid"])
    assert mean == pytest.approx(summary["best_valid_loss"], rel=1e-5)
    assert cell["figures"]["trainable_parameters"] == summary["trainable_parameters"]
    stored = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert cell["figures"]["adapter_bytes"] == stored and cell["figures"]["steps"] == 6
    assert {split: len(losses) for split, losses in cell["losses"].items()} == {"train": 16, "valid": 5, "test": 6}
    assert cell["correct"] == {}


def _mapping(run):
    from rankwise.recipes.run import run_document as document

    return document(run)


@pytest.mark.parametrize("kind", ["adapter", "full", "base"])
def test_the_same_again_to_the_last_bit(text_run, kind):
    first, second = (run_cell(text_run(), kind) for _ in range(2))
    assert first == second
    other = run_cell(text_run(seed=1), kind)
    assert (first["losses"] == other["losses"]) == (kind == "base")


def test_packed_losses_are_those_of_each_example_alone(text_run):
    packed, padded = (run_cell(text_run(packing=packing), "base") for packing in (True, False))
    assert packed["units"] == padded["units"]
    for split, losses in packed["losses"].items():
        assert losses == pytest.approx(padded["losses"][split], rel=1e-4)


def test_full_trains_every_weight_and_learns(text_run):
    run = text_run()
    model = load_model(ModelConfig(run.model.name, "cpu"), torch.float32)
    everything = sum(parameter.numel() for parameter in model.parameters())
    base, full = (run_cell(run, kind) for kind in ("base", "full"))
    assert base["figures"]["trainable_parameters"] == 0
    assert full["figures"]["trainable_parameters"] == everything
    assert full["figures"]["adapter_bytes"] == 4 * everything
    assert fmean(full["losses"]["train"]) < fmean(base["losses"]["train"]) - 0.1


def test_full_in_bf16_computes_in_bf16_and_keeps_fp32_weights(text_run):
    exact, rounded = (run_cell(text_run(precision), "full") for precision in ("fp32", "bf16"))
    assert exact["losses"] != rounded["losses"]
    assert fmean(rounded["losses"]["test"]) == pytest.approx(fmean(exact["losses"]["test"]), rel=0.05)


def test_classifiers(label_run):
    cells = {kind: run_cell(label_run, kind) for kind in ("base", "head", "adapter", "full")}
    counts = [cell["figures"]["trainable_parameters"] for cell in cells.values()]
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3]
    for cell in cells.values():
        assert set(cell["correct"]["test"]) <= {0, 1} and len(cell["correct"]["test"]) == 10
        assert set(cell["units"]["test"]) == {1}
    trained = [fmean(cell["losses"]["train"]) for cell in cells.values()]
    assert trained[0] > trained[1] > trained[2]


def test_what_the_bench_does_not_take(text_run, label_run):
    with pytest.raises(RequestError, match="precision fp32 or bf16, not auto"):
        check_cell(text_run("auto"), "adapter")
    with pytest.raises(RequestError, match="kind: head trains the head of a classifier"):
        check_cell(text_run(), "head")
    document = _mapping(text_run())
    for change, message in (
        ({"data": {**document["data"], "test": None}}, "give both"),
        ({"model": {**document["model"], "device": "auto"}}, "where a repeated cell gives the same"),
    ):
        with pytest.raises(RequestError, match=message):
            run_cell(build_run({**document, **change}), "adapter")


def test_losses_are_kept_as_float32():
    value = torch.tensor(1 / 3, dtype=torch.float32)
    assert torch.tensor(short(float(value)), dtype=torch.float32) == value and len(str(short(1 / 3))) < 12


def test_ranks_that_move_are_those_of_train(text_run, tmp_path):
    document = _mapping(text_run())
    run = build_run({**document, "ranks": {"policy": "grow", "max": 8, "every": 2, "start": 2}})
    cell = run_cell(run, "adapter")
    summary = train({**_mapping(run), "output": str(tmp_path / "out")}, quiet=True)
    assert cell["figures"]["trainable_parameters"] == summary["trainable_parameters"]
    assert cell["losses"] != run_cell(text_run(), "adapter")["losses"]


@pytest.mark.parametrize("policy", ["fixed", "nested"])
def test_an_adapter_cut_after_training_is_what_convert_rank_makes(text_run, tmp_path, policy):
    document = {**_mapping(text_run()), "ranks": {"policy": policy}}
    run = build_run(document)
    whole, cut = run_cell(run, "adapter"), run_cell(run, "adapter", 1)
    assert cut["figures"]["trainable_parameters"] * run.adapter.r == whole["figures"]["trainable_parameters"]
    assert cut["figures"]["adapter_bytes"] < whole["figures"]["adapter_bytes"]
    assert cut["losses"] != whole["losses"]
    train({**document, "output": str(tmp_path / "out")}, quiet=True)
    made = convert_rank(str(tmp_path / "out"), str(tmp_path / "cut"), rank=1)
    assert made["method"] == ("prefix" if policy == "nested" else "svd")
    config = EvaluateConfig(data=document["data"]["valid"], metrics=("loss",), precision="fp32")
    found = evaluate(str(tmp_path / "cut"), config, base=document["model"]["name"], device="cpu")
    pairs = zip(cut["losses"]["valid"], cut["units"]["valid"], strict=True)
    mean = sum(loss * count for loss, count in pairs) / sum(cut["units"]["valid"])
    assert mean == pytest.approx(found["results"][1]["loss"], rel=1e-4)
