"""The command under torchrun: one result, one message, a restart that goes on, a stop that saves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.recipes.runs import adapter_bytes, metrics, settings
from tests.train.rows import write_rows

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from rankwise.cli.main import main
from rankwise.recipes import finetune

train = finetune.train

def one_is_killed(config, on_step=None, resume=False, quiet=False):
    def kill(step):
        if os.environ["RANK"] == "{victim}" and step.number == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    return train(config, on_step=kill, resume=resume, quiet=quiet)

finetune.train = one_is_killed
sys.exit(main())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", 23)
    write_rows(folder / "valid.jsonl", 5, seed=1)
    return folder


def run_file(files: Path, output: Path, **train: object) -> str:
    document = settings(files, output)
    document["train"] |= {"steps": 8, **train}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(document))
    return str(path)


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and our own lines of stderr that name an error."""
    out, err = process.communicate(timeout=150)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("rankwise: error:")]


@pytest.mark.slow
def test_one_document_for_all_and_one_message_for_a_wrong_request(files: Path, tmp_path: Path) -> None:
    run = run_file(files, tmp_path / "out", sharding="full")
    code, out, errors = ended(start("-m", "rankwise", "train", run, "--json"))
    assert (code, errors) == (0, []) and json.loads(out)["steps"] == 8
    code, out, errors = ended(start("-m", "rankwise", "train", run, "--json"))
    assert code == 1, "torchrun's own; the command's was 2"
    assert json.loads(out)["error"]["code"] == 2
    assert len(errors) == 1 and "exists; choose another output" in errors[0]


@pytest.mark.slow
def test_one_result_of_an_evaluation(files: Path, tmp_path: Path) -> None:
    rest = ["--data", str(files / "valid.jsonl"), "--max-new-tokens", "4", "--precision", "fp32", "--json"]
    found = []
    for words in ([], ["--sharding", "full"]):
        code, out, errors = ended(start("-m", "rankwise", "evaluate", str(files / "model"), *rest, *words))
        assert (code, errors) == (0, [])
        found.append(json.loads(out)["results"])
    assert found[0] == found[1] and found[0][0]["loss"] > 0


def test_commands_for_one_process_say_so(tmp_path: Path) -> None:
    code, out, errors = ended(start("-m", "rankwise", "inspect", str(tmp_path), "--json"))
    assert code == 1 and len(errors) == 1 and "works in one process" in errors[0]
    assert json.loads(out)["error"]["code"] == 2


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_a_restart_goes_on(files: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(victim=0))
    run = run_file(files, tmp_path / "out")
    code, out, errors = ended(start("--max-restarts", "1", str(script), "train", run, "--json"))
    assert code == 0 and json.loads(out)["resumed_from"] == 3
    assert len(errors) == 1 and "lost another one" in errors[0] and "--resume" in errors[0]
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_restarted_job_ends_in_the_bytes_of_a_straight_one(victim: int, files: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(victim=victim))
    run = run_file(files, tmp_path / "killed")
    assert ended(start("--max-restarts", "1", str(script), "train", run))[0] == 0
    straight = run_file(files, tmp_path / "straight")
    assert ended(start("-m", "rankwise", "train", straight))[0] == 0
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "straight")


@pytest.mark.slow
def test_without_restarts_the_job_ends_with_one_message_and_no_other_job_goes_on(files: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(victim=1))
    run = run_file(files, tmp_path / "out")
    code, _, errors = ended(start(str(script), "train", run))
    assert code == 1 and len(errors) == 1 and "lost another one" in errors[0]
    code, _, errors = ended(start("--max-restarts", "1", "-m", "rankwise", "train", run))
    assert code == 1 and all("exists; choose another output" in error for error in errors), "another launch's folder"


@pytest.mark.slow
def test_an_interrupt_stops_all_after_one_step_with_a_checkpoint(files: Path, tmp_path: Path) -> None:
    run = run_file(files, tmp_path / "out", steps=100_000, save_every=None, evaluate_every=None, samples=None,
                   sample_tokens=None)  # fmt: skip
    document = yaml.safe_load(Path(run).read_text())
    del document["data"]["valid"], document["train"]["evaluate_every"]
    Path(run).write_text(yaml.safe_dump(document))
    process = start("-m", "rankwise", "train", run)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(process)
    assert code == 1 and len(errors) == 1 and "stopped after step" in errors[0]
    saved = list((tmp_path / "out" / "checkpoints").iterdir())
    assert len(saved) == 1 and saved[0].name == f"step-{metrics(tmp_path / 'out')[-1]['step']}"
