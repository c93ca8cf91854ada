"""Runs in fp16: exact resume across skipped steps, what the log says, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.errors import RequestError
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.train import precision, scale
from rankwise.train.interrupt import Interrupted
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_going_on_gives_the_bytes_of_the_straight_run(files, tmp_path, monkeypatch, capsys, quantization) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'rankwise[quantized]'")
    monkeypatch.setattr(scale, "INITIAL", 2.0**26)  # overflows in the first steps
    monkeypatch.setattr(scale, "GROWTH_INTERVAL", 3)
    fp16 = {"train": {"precision": "fp16"}, "model": {"quantization": quantization}}
    train(settings(files, tmp_path / "straight", **fp16))
    said = capsys.readouterr().err
    assert (
        "the gradients overflowed fp16, the step was skipped (1 step so far); the loss scale is now 3.35544e+07" in said
    )
    lines = metrics(tmp_path / "straight")
    assert lines[0]["grad_norm"] is None and lines[0]["skipped_steps"] == 1 and lines[0]["loss_scale"] == 2.0**25
    assert lines[-1]["skipped_steps"] == sum(line["grad_norm"] is None for line in lines) < 12
    assert len({line["loss_scale"] for line in lines}) > 2 and lines[-1]["valid_loss"] < lines[3]["valid_loss"]
    for stop in (1, 7):
        stopped = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted):
            train(settings(files, stopped, **fp16), on_step=interrupting(stop), quiet=True)
        assert train(settings(files, stopped, **fp16), resume=True, quiet=True)["resumed_from"] == stop
        assert adapter_bytes(stopped) == adapter_bytes(tmp_path / "straight")
        assert unmeasured(metrics(stopped)) == unmeasured(lines)


def test_it_learns_what_fp32_learns(files: Path, straight: Path, tmp_path: Path) -> None:
    train(settings(files, tmp_path / "fp16", train={"precision": "fp16"}), quiet=True)
    wide, narrow = metrics(straight), metrics(tmp_path / "fp16")
    assert [line["loss"] for line in narrow] == pytest.approx([line["loss"] for line in wide], rel=0.02)
    found = evaluate(str(tmp_path / "fp16"), EvaluateConfig(precision="fp16", max_new_tokens=3), device="cpu")
    assert found["precision"] == "fp16" and found["results"][1]["loss"] == pytest.approx(
        wide[-1]["valid_loss"], rel=0.05
    )


def test_where_the_device_cannot(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    monkeypatch.setattr(precision.F, "scaled_dot_product_attention", fails)
    with pytest.raises(
        RequestError, match=r"fp16 does not work on cpu \(.*not implemented for 'Half'\); use bf16 or fp32"
    ):
        train(settings(files, tmp_path / "out", train={"precision": "fp16"}), quiet=True)
    assert not (tmp_path / "out").exists()


def test_biases_of_the_base_need_fp32(files: Path, tmp_path: Path) -> None:
    run = settings(files, tmp_path / "out", adapter={"modules_to_save": ["norm"]}, train={"precision": "fp16"})
    with pytest.raises(RequestError, match=r"small steps are lost in fp16; set train.precision=fp32"):
        train(run, quiet=True)
