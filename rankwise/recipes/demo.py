"""The demo: a real model learns to turn archaic English into modern English, and every claim about it is measured.

Train, evaluate on books that were not trained on (against the base, and against copying the input), merge, certify,
evaluate the merged model, draw the loss curve. Everything it calls is what the other commands call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.attach.inject import disabled
from rankwise.data.loader import load_examples
from rankwise.errors import RequestError
from rankwise.files import write_json
from rankwise.models.config import ModelConfig
from rankwise.models.load import choose_device, load_tokenizer
from rankwise.recipes.evaluate import EvaluateConfig, Exam, Graded, copied, grade, make_exam
from rankwise.recipes.finetune import train
from rankwise.recipes.loss_curve import draw_loss_curve
from rankwise.recipes.merge import merge_target, stored_dtype
from rankwise.recipes.output import RunFolder
from rankwise.recipes.run import RunConfig, read_run
from rankwise.recipes.target import Target, find_target, open_in
from rankwise.train.objectives import OBJECTIVES
from rankwise.train.precision import Precision, choose_precision

DATA = Path(__file__).parent / "demo_data"
DEFAULT_OUTPUT = "runs/demo"
NUM_SAMPLES = 6
PICTURE, RESULTS, MERGED = "loss.png", "demo.json", "merged"


@dataclass(frozen=True)
class DemoPlan:
    """How much the demo does.

    Args:
        steps, batch_size, micro_batch_size, r, lr: of the training.
        evaluate_every: steps between losses on the validation rows; None: not while training.
        test_rows: held-out rows that all models answer.
        max_length: tokens a row may have.
        max_new_tokens: the longest answer.
    """

    steps: int = 200
    batch_size: int = 16
    micro_batch_size: int = 16
    r: int = 16
    lr: float = 1e-3
    evaluate_every: int | None = 100
    test_rows: int = 96
    max_length: int = 256
    max_new_tokens: int = 96
    eval_batch_size: int = 32


PLANS: dict[str, DemoPlan] = {
    "default": DemoPlan(),
    "quick": DemoPlan(steps=40, evaluate_every=None, test_rows=32),
}


@dataclass
class Stopwatch:
    """Seconds by stage, in the order in which the stages came."""

    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says what begins, and counts its time."""
        print(f"== {name}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.times[name] = time.perf_counter() - started


def demo(
    plan: DemoPlan, output: str | None = None, model: str = "demo", device: str = "auto", progress: bool = True
) -> dict[str, Any]:
    """The document of `rankwise demo`, which is also in the output's demo.json.

    `output`: None takes `runs/demo`, or with a number where that exists.

    Raises: RequestError for an output that exists or a model that can't be had; WorkError when training or the merge
    fails.
    """
    folder = RunFolder(free_output(output))
    folder.check(resume=False)
    watch = Stopwatch()
    with watch.stage("get the model"):
        config = ModelConfig(model, device)
        tokenizer = load_tokenizer(config)
        precision = choose_precision("auto", choose_device(device))
    run = demo_run(plan, folder.path, config, precision)
    print(introduction(run, plan), file=sys.stderr)
    with watch.stage("train"):
        summary = train(run, quiet=not progress)
    test = str(DATA / "test.jsonl")
    settings = EvaluateConfig(rows=plan.test_rows, batch_size=plan.eval_batch_size, max_new_tokens=plan.max_new_tokens)
    rows = load_examples(test, tokenizer, run.data)
    exam = make_exam(rows, run.data, tokenizer, None, settings, OBJECTIVES[run.train.objective], progress)
    target = find_target(str(folder.path), device=device)
    graded = {"copy": copied(exam), **grade_both(target, exam, precision, watch)}
    with watch.stage("merge and certify"):
        merged = merge_target(target, folder.path / MERGED, stored_dtype(target), tokenizer)
    with watch.stage("evaluate merged"):
        opened = open_in(find_target(str(merged.folder), device=device), precision.dtype, precision.name)
        graded["merged"] = grade(opened.model, exam, "merged")
    results = [entry.result for entry in graded.values()]
    with watch.stage("draw the loss curve"):
        losses = {entry["target"]: entry["loss"] for entry in results if entry["target"] in ("base", "adapter")}
        levels = {f"{name} on unseen books": loss for name, loss in losses.items()}
        draw_loss_curve(folder.metrics.read(), folder.path / PICTURE, "archaic to modern English", levels)
    document = {
        "output": str(folder.path), "results": results, "rows": len(exam.examples), "precision": precision.name,
        "samples": samples(exam, graded), "train": summary,
        "merged": {"output": str(merged.folder), "error": merged.rounding.error},
        "certificate": merged.certificate.to_dict(), "picture": str(folder.path / PICTURE), "time_s": watch.times,
    }  # fmt: skip
    write_json(folder.path / RESULTS, document)
    return document


def free_output(output: str | None) -> Path:
    """Where the demo may write: the folder asked for, or the first of runs/demo, runs/demo-2, ... that is free.

    Raises: RequestError when the folder asked for exists.
    """
    if output is not None:
        if Path(output).exists():
            raise RequestError(f"output '{output}' exists; choose another folder, or remove it")
        return Path(output).absolute()
    path, number = Path(DEFAULT_OUTPUT), 1
    while path.exists():
        number += 1
        path = Path(f"{DEFAULT_OUTPUT}-{number}")
    return path.absolute()


def demo_run(plan: DemoPlan, output: Path, model: ModelConfig, precision: Precision) -> RunConfig:
    """The demo's training as a run: its run.yaml is a run file like any other."""
    data: dict[str, Any] = {"train": str(DATA / "train.jsonl"), "max_length": plan.max_length}
    training: dict[str, Any] = {
        "steps": plan.steps, "batch_size": plan.batch_size, "micro_batch_size": plan.micro_batch_size, "lr": plan.lr,
        "schedule": "cosine", "precision": precision.name, "save_every": None, "evaluate_every": plan.evaluate_every,
    }  # fmt: skip
    if plan.evaluate_every is not None:
        data["valid"] = str(DATA / "valid.jsonl")
        training["samples"] = 0
    return read_run(
        {
            "model": {"name": model.name, "device": model.device},
            "adapter": {"r": plan.r, "lora_alpha": 2 * plan.r, "target_modules": "all-linear"},
            "data": data,
            "train": training,
            "output": str(output),
        }
    )


def introduction(run: RunConfig, plan: DemoPlan) -> str:
    """What will happen, before anything does."""
    with open(DATA / "train.jsonl", "rb") as file:
        num_rows = sum(1 for _ in file)
    return (
        f"Fine-tuning '{run.model.name}' with LoRA to turn archaic English into modern English: {plan.steps} steps of "
        f"{plan.batch_size} of {num_rows:,} verse pairs.\n"
        f"Then {plan.test_rows} verses of five books that it has never seen (Ruth, Ecclesiastes, Daniel, Galatians, "
        "James) are answered by the base, the adapter and the merged model, and compared with copying the input.\n"
        f"Everything goes to {run.output}"
    )


def grade_both(target: Target, exam: Exam, precision: Precision, watch: Stopwatch) -> dict[str, Graded]:
    """Base and adapter on the exam, from one model in memory."""
    with watch.stage("load the adapter"):
        model = open_in(target, precision.dtype, precision.name).model
    with watch.stage("evaluate base"), disabled(model):
        base = grade(model, exam, "base")
    with watch.stage("evaluate adapter"):
        adapter = grade(model, exam, "adapter")
    return {"base": base, "adapter": adapter}


def samples(exam: Exam, graded: dict[str, Graded], most: int = NUM_SAMPLES) -> list[dict[str, str]]:
    """Rows spread evenly over the exam: `input`, `reference`, and each model's answer."""
    count = min(most, len(exam.examples))
    chosen = [place * len(exam.examples) // count for place in range(count)]
    return [
        {
            "input": exam.examples[i].source,
            "reference": exam.examples[i].answer,
            **{name: graded[name].answers[i] for name in ("base", "adapter", "merged")},
        }
        for i in chosen
    ]
