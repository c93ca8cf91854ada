"""`rankwise export --to onnx` from run folders: the folder, its report, adapters on one graph, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rankwise.errors import RequestError, WorkError
from rankwise.export.onnx_folder import check_files, read_manifest
from rankwise.export.onnx_runtime import OnnxModel
from rankwise.export.onnx_verify import torch_logits
from rankwise.recipes.export import export
from rankwise.recipes.finetune import train
from rankwise.recipes.target import find_target, open_target
from tests import tiny
from tests.recipes.trained import run_document, save_model, trained_run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two runs on one base: `root/run`, rank 4, and `root/other`, rank 2 on fewer layers."""
    root = tmp_path_factory.mktemp("onnx")
    trained_run(root)
    document = run_document(root, str(root / "model"), steps=3)
    document["adapter"] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    train({**document, "output": str(root / "other")}, quiet=True)
    return root


@pytest.fixture(scope="module")
def exported(root) -> Path:
    """Both adapters on one graph."""
    settings = {"adapters": [f"other={root / 'other'}"]}
    export(str(root / "run"), str(root / "onnx"), "onnx", settings, device="cpu")
    return root / "onnx"


def to_onnx(run, out, **settings):
    return export(str(run), str(out), "onnx", settings, device="cpu")


def test_the_folder_and_its_report(exported):
    names = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    assert names == {
        "model.onnx", "model.onnx.data", "adapters/run.onnx_adapter", "adapters/other.onnx_adapter", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "rankwise_onnx.json", "export_report.json",
    }  # fmt: skip
    rows = json.loads((exported / "export_report.json").read_text())["report"]
    assert [row["artifact"] for row in rows] == [
        "model.onnx",
        "adapters/run.onnx_adapter",
        "adapters/other.onnx_adapter",
    ]
    for row in rows:
        assert row["ran"] and row["max_abs_diff"] <= row["bounds"]["max_abs_diff"] == 1e-3 and row["kl"] < 1e-6
        assert row["by_token_max_abs_diff"] < 1e-3 and row["same_text"] == 1.0 and row["precision"] == "fp32"
    assert rows[0]["speedup"] > 0 and "in turns with torch" in rows[0]["note"]
    stated = read_manifest(exported)
    assert (stated.adapters["other"].least_rank, stated.adapters["run"].most_rank) == (2, 4)
    check_files(exported, stated, whole=True)


@pytest.mark.parametrize("name", ["run", "other"])
def test_each_adapter_is_its_run_in_torch(root, exported, name):
    model = OnnxModel(exported, 1)
    opened = open_target(find_target(str(root / name), device="cpu"), "fp32")
    row = tiny.token_ids(1, 12)[0].tolist()
    [wanted] = torch_logits(opened.model, [row])
    assert float((torch.from_numpy(model.logits(row, name)) - wanted).abs().max()) < 1e-4
    assert float((torch.from_numpy(model.logits(row)) - wanted).abs().max()) > 1e-2, "the base is another"


@pytest.mark.slow
def test_int8_is_within_its_bound_or_names_whom_to_blame(root, tmp_path):
    document = to_onnx(root / "run", tmp_path / "q", int8="weights", max_kl=0.3)
    assert document["report"][1]["bounds"] == {"kl": 0.3, "by_token_kl": 0.3}
    assert not list((tmp_path / "q").glob(".*")) and read_manifest(tmp_path / "q").precision == "int8"
    with pytest.raises(
        WorkError, match=r"above --max-kl 1e-09; it loses most by (\w+ \(without it [\d.e-]+\)(, )?){3};"
    ):
        to_onnx(root / "run", tmp_path / "in" / "q", int8="weights", max_kl=1e-9)
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.slow
def test_full_int8_leaves_out_what_it_has_to(root, tmp_path):
    loose = to_onnx(root / "run", tmp_path / "a", int8="full", max_kl=1.0)["report"]
    assert loose[0]["left_out"] == []
    bound = 0.8 * max(row[name] for row in loose for name in ("kl", "by_token_kl"))
    tight = to_onnx(root / "run", tmp_path / "b", int8="full", max_kl=bound)["report"]
    assert tight[0]["left_out"] and all(row[name] <= bound for row in tight for name in ("kl", "by_token_kl"))


@pytest.mark.slow
def test_merged_has_no_adapter_to_switch(tmp_path):
    run = trained_run(tmp_path, tiny.qwen(tied=True))
    document = to_onnx(run, tmp_path / "m", merged=True)
    [row] = document["report"]
    assert row["artifact"] == "model.onnx" and row["max_abs_diff"] < 1e-3 and "folded in" in row["note"]
    with pytest.raises(RequestError, match="merged into its graph"):
        read_manifest(tmp_path / "m").choose("run")


def test_what_is_refused_before_anything_is_loaded(root, tmp_path):
    run, out = root / "run", tmp_path / "m"
    with pytest.raises(RequestError, match="--int8 and --int4 both say"):
        to_onnx(run, out, int8="weights", int4=True)
    with pytest.raises(RequestError, match="--max-kl has no effect without --int8 or --int4"):
        to_onnx(run, out, max_kl=0.1)
    with pytest.raises(RequestError, match="--max-kl must be above 0, not -1"):
        to_onnx(run, out, max_kl=-1.0, int4=True)
    with pytest.raises(RequestError, match="--merged folds one adapter into the graph, so --adapters has no effect"):
        to_onnx(run, out, merged=True, adapters=[f"b={run}"])
    with pytest.raises(RequestError, match="write name=path"):
        to_onnx(run, out, adapters=[str(run)])
    with pytest.raises(RequestError, match="the name 'run' stands twice"):
        to_onnx(run, out, adapters=[f"run={root / 'other'}"])
    with pytest.raises(RequestError, match=r"'\.\./up' can't be an adapter's name"):
        to_onnx(run, out, adapters=[f"../up={root / 'other'}"])
    with pytest.raises(RequestError, match="--int8 'ful' is unknown for --to onnx; did you mean 'full'"):
        to_onnx(run, out, int8="ful")
    assert not out.exists()


def test_adapters_of_another_base_are_refused(root, tmp_path):
    shutil.copytree(root / "other" / "adapter", tmp_path / "elsewhere")
    save_model(tmp_path / "base")
    config = tmp_path / "elsewhere" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(RequestError, match=r"--adapters b: its base is .*; adapters on one graph share their base"):
        to_onnx(root / "run", tmp_path / "m", adapters=[f"b={tmp_path / 'elsewhere'}"])


def test_dora_is_refused_with_the_way_out(root, tmp_path):
    document = run_document(tmp_path, str(root / "model"), steps=2)
    document["adapter"] = {"r": 2, "use_dora": True}
    train(document, quiet=True)
    with pytest.raises(
        RequestError, match=r"is DoRA: adapters that can be switched are low-rank .*; export it with --merged"
    ):
        to_onnx(tmp_path / "run", tmp_path / "in" / "m")
    assert list((tmp_path / "in").iterdir()) == []


def test_without_the_packages_the_command_says_how(root, tmp_path, monkeypatch):
    from rankwise.export import onnx_folder

    monkeypatch.setattr(onnx_folder, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(RequestError, match=r"ONNX needs no_such_package, not installed here; run `pip install"):
        onnx_folder.need_packages(onnx_folder.PACKAGES)
