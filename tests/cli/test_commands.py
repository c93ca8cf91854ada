"""Each command from its line to its document, exit code and output for people, on a tiny run."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rankwise.attach.inject import disabled
from rankwise.cli.main import main
from rankwise.export import certificate
from rankwise.recipes.target import find_target, open_target
from tests.recipes.trained import figures, rows, run_document, save_model, trained_run, write_rows

PRECISION = ["--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def call(capsys):
    """Runs a line with and without --json: exit code, document, text for people, stderr."""

    def called(*argv, json_only: bool = False):
        capsys.readouterr()
        code = main([*map(str, argv), "--json"])
        out, err = capsys.readouterr()
        document = json.loads(out)
        if json_only:
            return code, document, "", err
        assert main([*map(str, argv)]) == code
        return code, document, capsys.readouterr().out, err

    return called


def check_failure(call, code: int, message: str, *argv):
    found, document, text, err = call(*argv)
    assert found == code and list(document) == ["error"] and text == ""
    assert document["error"]["code"] == code and message in document["error"]["message"]
    lines = [line for line in err.splitlines() if line.startswith("rankwise: error:")]
    assert lines == [f"rankwise: error: {document['error']['message']}"] and "Traceback" not in err


# --- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate(call, run):
    code, document, text, _ = call("evaluate", run, "--max-new-tokens", 4, *PRECISION)
    assert code == 0 and [row["target"] for row in document["results"]] == ["base", "adapter"]
    assert list(document["results"][0]) == ["target", "loss", "perplexity", "chrf", "bleu", "rouge_l", "exact_match"]
    for word in ("base", "adapter", "loss", "chrF", "BLEU", "ROUGE-L", "exact match"):
        assert word in text


@pytest.mark.parametrize("words", [["loss", "chrf"], ["loss,chrf"]])
def test_evaluate_metrics_rows_and_data(call, run, words):
    data = run.parent / "train.jsonl"
    argv = ["evaluate", "--metrics", *words, "--rows", 3, "--data", data, "--batch-size", 2, "--copy", *PRECISION]
    code, document, _, _ = call(*argv, run, json_only=True)
    assert code == 0 and document["rows"] == 3 and document["data"] == str(data)
    assert [list(row) for row in document["results"]] == [["target", "chrf"], *[["target", "loss", "chrf"]] * 2]


def test_evaluate_any_kind_of_file(call, run, tmp_path):
    few = rows(3, first=2)
    write_rows(tmp_path / "rows.jsonl", few)
    (tmp_path / "rows.json").write_text(json.dumps(few))
    (tmp_path / "rows.csv.gz").write_bytes(
        gzip.compress("".join(["prompt,completion\n", *(f"{r['prompt']},{r['completion']}\n" for r in few)]).encode())
    )
    pq.write_table(pa.Table.from_pylist(few), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "rows.parquet", folder)
    found = []
    for name in ("rows.jsonl", "rows.json", "rows.csv.gz", "rows.parquet", "folder", "*.json"):
        line = (
            "evaluate",
            run,
            "--data",
            tmp_path / name,
            "--metrics",
            "loss",
            "chrf",
            "--copy",
            "--max-new-tokens",
            4,
        )
        code, document, _, err = call(*line, "--max-new-tokens", 4, *PRECISION, json_only=True)
        assert code == 0, err
        found.append([figures(result) for result in document["results"]])
    assert all(figure == found[0] for figure in found)


def test_evaluate_a_model(call, run):
    model = run.parent / "model"
    argv = ["evaluate", model, "--data", run.parent / "valid.jsonl", "--metrics", "loss", *PRECISION]
    code, document, _, _ = call(*argv, json_only=True)
    assert code == 0 and [row["target"] for row in document["results"]] == [str(model)]


def test_evaluate_an_adapter_that_was_copied_elsewhere(call, run, tmp_path):
    """The folder alone is enough: it names its base, and the figures are those of the run's."""
    alone = shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "mine")
    argv = ["--data", run.parent / "valid.jsonl", "--max-new-tokens", 4, *PRECISION]
    code, document, _, _ = call("evaluate", alone, *argv, json_only=True)
    assert code == 0 and document["kind"] == "adapter"
    _, expected, _, _ = call("evaluate", run, *argv, json_only=True)
    for found, wanted in zip(document["results"], expected["results"], strict=True):
        assert figures(found) == pytest.approx(figures(wanted), rel=1e-4)


def test_peft_loads_the_adapter_with_its_base_from_the_folder_alone(run, tmp_path):
    alone = shutil.copytree(run / "adapter", tmp_path / "mine")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(alone)).eval()
    ours = open_target(find_target(str(alone), device="cpu"), "fp32").model
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
        with theirs.disable_adapter(), disabled(ours):
            assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_evaluate_refuses(call, run, tmp_path):
    check_failure(call, 2, "unknown metric 'blue'; did you mean 'bleu'", "evaluate", run, "--metrics", "blue")
    check_failure(call, 2, "did you mean 'valid.jsonl'", "evaluate", run, "--data", run.parent / "vaild.jsonl")
    check_failure(call, 2, "there is no folder", "evaluate", run.parent / "rum", "--data", "x.jsonl")
    check_failure(call, 2, "give one with --data", "evaluate", run.parent / "model")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    check_failure(call, 2, "broken.jsonl:2", "evaluate", run, "--data", broken)
    check_failure(call, 2, "model.device 'gpu' is not a device", "evaluate", run, "--device", "gpu")
    argv = ["--metrics", "loss", "--max-new-tokens", 9]
    check_failure(
        call, 2, "--max-new-tokens 9 has no effect: no answers are generated for loss", "evaluate", run, *argv
    )


@pytest.mark.parametrize("command", [["evaluate", "nope", "--data", "DATA"], ["generate", "nope", "--prompt", "hi"]])
def test_a_mistyped_name_is_one_line(call, run, command):
    argv = [run.parent / "valid.jsonl" if word == "DATA" else word for word in command]
    check_failure(call, 2, "model 'nope' is neither a folder here nor in the local Hub cache", *argv)
    assert call(*argv)[3].count("\n") == 1


# --- merge ---------------------------------------------------------------------------------------------------------


def test_merge(call, run, tmp_path):
    code, document, _, err = call("merge", run, "--out", tmp_path / "m", "--dtype", "bf16", json_only=True)
    assert code == 0 and document["output"] == str(tmp_path / "m") and 0 < document["error"] < 0.01
    assert {"dtype", "max_abs_diff", "mean_abs_diff", "kl"} <= set(document["certificate"])
    assert document["certificate"]["dtype"] == "bf16" and err == ""
    assert (tmp_path / "m" / "merge_certificate.json").is_file()


def test_in_a_process_of_its_own_stdout_is_json_alone(run, tmp_path):
    """Whatever libraries print (progress of writing and loading, notices) stays off stdout."""
    command = [sys.executable, "-m", "rankwise", "merge", str(run), "--out", str(tmp_path / "m"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == str(tmp_path / "m")
    assert done.stderr == ""


def test_merge_for_people(run, tmp_path, capsys):
    assert main(["merge", str(run / "adapter"), "--out", str(tmp_path / "m")]) == 0
    text = capsys.readouterr().out
    assert str(tmp_path / "m") in text and "certificate: KL" in text and "rounding: 0.0e+00" in text


def test_merge_refuses(call, run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    check_failure(call, 2, "exists; choose another", "merge", run, "--out", tmp_path / "there")
    check_failure(call, 2, "no run or adapter folder", "merge", tmp_path / "nope", "--out", tmp_path / "m")
    check_failure(call, 2, "model without an adapter", "merge", run.parent / "model", "--out", tmp_path / "m")
    monkeypatch.setitem(certificate.KL_BOUNDS, "bf16", 0.0)
    argv = ["merge", run, "--out", tmp_path / "m", "--dtype", "bf16"]
    check_failure(call, 1, "its folder was removed; merge with --dtype fp32", *argv)
    assert not (tmp_path / "m").exists()


# --- generate and chat ---------------------------------------------------------------------------------------------


def test_generate(call, run):
    argv = ["generate", run, "--prompt", "Capitals: oak", "Capitals: elm", "--max-new-tokens", 5, *PRECISION]
    code, document, text, _ = call(*argv)
    assert code == 0 and [row["prompt"] for row in document["results"]] == ["Capitals: oak", "Capitals: elm"]
    assert text.startswith("> Capitals: oak\n" + document["results"][0]["answer"])
    code, document, text, _ = call(
        "generate", run.parent / "model", "--prompt", "hi", "--max-new-tokens", 5, *PRECISION
    )
    assert text == document["results"][0]["answer"] + "\n"


def test_generate_refuses(call, run):
    check_failure(call, 2, "prompt 1 is empty", "generate", run, "--prompt", "")
    check_failure(call, 2, "does not fit into the model's 512", "generate", run, "--prompt", "x" * 600)
    check_failure(call, 2, "is a file; give its folder", "generate", run / "run.yaml", "--prompt", "hi")


LINES = "hello\n\n/nope\n/base\n/base\n" + "too long " * 80 + "\nagain\n/quit\nnever read\n"


def test_chat(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(LINES))
    assert main(["chat", str(run), "--system", "Be brief.", "--max-new-tokens", "4", *PRECISION, "--json"]) == 0
    out, err = capsys.readouterr()
    messages = json.loads(out)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "again"
    assert "does not fit into the model's 512 positions" in err, "said, and the conversation goes on"
    assert "unknown '/nope'" in err and "(base alone)" in err and "(with the adapter)" in err


def test_chat_prints_answers_and_ends_with_the_input(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nhello\n"))
    assert main(["chat", str(run), "--max-new-tokens", "4", *PRECISION]) == 0
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect(call, run):
    code, document, text, _ = call("inspect", run / "adapter")
    assert code == 0
    assert {"kind", "base", "ranks", "trainable_parameters", "file_bytes", "modules"} <= set(document)
    assert list(document["modules"][0]) == ["name", "rank", "effective_rank", "norm"] and len(document["modules"]) == 14
    assert "q_proj" in text and f"{document['trainable_parameters']:,} parameters" in text
    assert call("inspect", run, json_only=True)[1]["modules"] == document["modules"]


def test_inspect_refuses(call, run, tmp_path):
    check_failure(call, 2, "is not an adapter", "inspect", tmp_path)
    copied = shutil.copytree(run / "adapter", tmp_path / "a")
    (copied / "adapter_model.safetensors").write_bytes(b"torn")
    check_failure(call, 2, "torn or not a safetensors file", "inspect", copied)


# --- convert-rank --------------------------------------------------------------------------------------------------


def test_convert_rank(call, run, tmp_path):
    code, document, _, _ = call("convert-rank", run, "--rank", 2, "--out", tmp_path / "two", json_only=True)
    assert code == 0 and document["output"] == str(tmp_path / "two") and 0 < document["error"] < 1
    assert set(call("inspect", tmp_path / "two", json_only=True)[1]["ranks"].values()) == {2}
    check_failure(call, 2, "exists; choose another", "convert-rank", run, "--rank", 2, "--out", tmp_path / "two")
    assert main(["convert-rank", str(run / "adapter"), "--energy", "0.9", "--out", str(tmp_path / "small")]) == 0


def test_convert_rank_refuses(call, run, tmp_path):
    out = "--out", tmp_path / "new"
    check_failure(call, 2, "give --rank or --energy", "convert-rank", run, *out)
    check_failure(call, 2, "no effect: no layer", "convert-rank", run, "--rank", 4, *out)
    check_failure(call, 2, "above 0 and at most 1, not 2", "convert-rank", run, "--energy", 2, *out)
    check_failure(call, 2, "must be a whole number from 1", "convert-rank", run, "--rank", 0, *out)
    assert not (tmp_path / "new").exists()


# --- train and data preview, through the command -------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path) -> Path:
    document = run_document(tmp_path, save_model(tmp_path / "model"))
    path = tmp_path / "first.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def test_train(call, run_file, tmp_path):
    code, document, _, err = call("train", run_file, "train.steps=3", json_only=True)
    fields = {
        "output", "steps", "final_loss", "best_valid_loss", "tokens_per_s", "peak_memory_bytes",
        "trainable_parameters", "resumed_from",
    }  # fmt: skip
    assert code == 0 and fields <= set(document) and document["steps"] == 3 and document["resumed_from"] is None
    assert "training" in err
    check_failure(call, 2, "exists; choose another output, or go on", "train", run_file)
    check_failure(call, 2, "did you mean 'train.lr'", "train", run_file, "train.lrr=1", f"output={tmp_path}/other")


def test_flags_may_stand_between_values(call, run_file):
    code, document, _, _ = call("train", run_file, "--resume", "train.steps=2", json_only=True)
    assert code == 0 and document["steps"] == 2


def test_data_preview(call, run_file):
    code, document, text, _ = call("data", "preview", run_file, "--rows", 2)
    fields = {"rows", "tokens", "trained_tokens", "truncated", "duplicates", "leaks", "problems", "examples"}
    assert code == 0 and fields <= set(document) and document["rows"] == 16 and len(document["examples"]) == 2
    assert set(document["examples"][0]) >= {"text", "trained_spans"} and "Capitals" in text


def test_data_preview_of_broken_rows(call, run_file, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(rows(1)[0]) + "\n{oops\n")
    code, document, _, err = call("data", "preview", run_file, json_only=True)
    assert code == 2 and document["error"]["code"] == 2
    assert [(p["file"], p["line"]) for p in document["problems"]] == [(str(tmp_path / "train.jsonl"), 2)]
    assert err.splitlines()[-1] == f"rankwise: error: {document['error']['message']}"


# --- demo ----------------------------------------------------------------------------------------------------------


def test_demo_refuses(call, tmp_path, run):
    check_failure(call, 2, "exists; choose another folder", "demo", "--quick", "--output", tmp_path)
    (tmp_path / "file").touch()
    check_failure(call, 2, "file' is not a folder", "demo", "--quick", "--output", tmp_path / "file" / "d")
    check_failure(
        call, 2, "there is no such folder", "demo", "--quick", "--output", tmp_path / "d", "--model", "./nope"
    )
    assert not (tmp_path / "d").exists()


def test_demo(call, tmp_path, run, monkeypatch):
    from rankwise.recipes import demo as room

    tiny_plan = room.DemoPlan(
        steps=2,
        batch_size=2,
        micro_batch_size=2,
        r=2,
        evaluate_every=None,
        test_rows=2,
        max_length=400,
        max_new_tokens=3,
    )
    monkeypatch.setitem(room.PLANS, "quick", tiny_plan)
    argv = ["demo", "--quick", "--output", tmp_path / "d", "--model", run.parent / "model", "--device", "cpu"]
    code, document, _, err = call(*argv, json_only=True)
    assert code == 0 and document["output"] == str(tmp_path / "d")
    assert [row["target"] for row in document["results"]] == ["copy", "base", "adapter", "merged"]
    assert "turn archaic English into modern English" in err


def test_bad_rows_of_several_files_in_one_line(call, run, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [{"prompt": 1, "completion": "x"}, {"prompt": "a", "completion": ""}])
    check_failure(call, 2, "bad.jsonl", "evaluate", run, "--data", data)


# --- combine -------------------------------------------------------------------------------------------------------


def test_combine(call, run, tmp_path):
    file = run.parent / "valid.jsonl"
    line = ["combine", run, run, "--weights", 0.5, -0.25, "--tasks", f"own={file}", *PRECISION, "--out"]
    code, document, _, err = call(*line, tmp_path / "out", json_only=True)
    assert code == 0 and document["output"] == str(tmp_path / "out") and document["error"] < 1e-6
    assert document["weights"] == [0.5, -0.25] and document["tasks"][0]["task"] == "own"
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert main([*map(str, line), str(tmp_path / "again")]) == 0
    argv = ["combine", run, run, "--method", "linear", "--out", tmp_path / "l", "--tune", file, "--trials", 2]
    code, document, _, err = call(*argv, *PRECISION, json_only=True)
    assert code == 0 and document["tune"]["trials"] <= 3 and "note: linear adds the factors" in err and "trial 1" in err


def test_combine_for_people(run, tmp_path, capsys):
    file = run.parent / "valid.jsonl"
    line = ["combine", run, run, "--tune", file, "--trials", 3, "--tasks", *PRECISION, "--out", tmp_path / "out"]
    assert main([*map(str, line)]) == 0
    text = capsys.readouterr().out
    for words in ("by sum, weights", "ranks 4 to 4", "in 3 trials", "loss on each task", "combined", "lost"):
        assert words in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--method", "sun"], "--method can't be 'sun'; did you mean 'sum'?"),
        (["--weights", "1"], "--weights are 1 (1) for 2 adapters"),
        (["--rank", "2"], "--rank 2 has no effect on --method sum"),
        (["--tasks", "nameless"], "--tasks takes NAME=FILE, not 'nameless'"),
        (["--tasks", "a=x", "a=y"], "--tasks names 'a' twice"),
        (["--trials", "3"], "--trials 3 has no effect without --tune"),
    ],
)
def test_combine_refused(call, run, tmp_path, line, message):
    check_failure(call, 2, message, "combine", run, run, "--out", tmp_path / "out", *line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["combine", "one", "two"], ["export", "one", "--to", "merged"]])
def test_a_name_that_no_disk_holds_is_refused_in_one_line(command, capsys):
    assert main([*command, "--out", "x" * 300]) == 2
    assert "can't be made" in capsys.readouterr().err
