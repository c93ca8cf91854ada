"""A stream of requests that changes task without saying so: is each routed right, and what does it cost?

    python benchmarks/task_stream.py --steps 100 --requests 480 --run-length 4 \\
        --out benchmarks/results/task_stream.jsonl

wrote the line of that file: one seed, 100 steps in all for the four adapters.

MiniLM, and an adapter for each of the four domains of sentiment in benchmarks/quality/data, trained in one run under an
inferred gate. Then test rows come one at a time, in runs of one task whose lengths are random (geometric); a switch is
to another task, drawn anew. Each request is answered four times:

- `given`: its task's id comes with it (a hard gate: the oracle);
- `inferred`: nothing comes with it; the gate's classifier reads it by itself;
- `smoothed`: likewise, but the classifier's logits are averaged over the requests before (half as much for each one
  further back), which a stream that seldom switches invites;
- `uniform`: all adapters in equal shares (the floor).

Requests of a run are alike, so intervals (95 %) come from drawing whole runs again. `first`: the first request after a
switch; `later`: the others of its run. Excess loss: that of a policy less that of `given`, on the same request.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measure import header, ratio, settings_of
from transformers import PreTrainedModel

import rankwise as rw
from rankwise.attach.gates import mixture_of
from rankwise.recipes.target import Opened, find_target, open_target, target_head
from rankwise.tasks.router import states_of

DATA = Path(__file__).parent / "quality" / "data" / "sentiment"
TASKS = ("tweets", "movies", "products", "editorials")
POLICIES = ("given", "inferred", "smoothed", "uniform")
DRAWS = 2000


@dataclass
class Request:
    """One test row in the stream, and how each policy did on it."""

    task: str
    ids: list[int]
    label: int
    run: int
    is_first: bool
    losses: dict[str, float] = field(default_factory=dict)
    right: dict[str, bool] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)


def trained(folder: Path, options: argparse.Namespace) -> Path:
    """Trains the gate's adapters and its classifier; the run's folder."""
    files: dict[str, dict[str, str]] = {}
    for task in TASKS:
        rows = (DATA / task / "train.jsonl").read_text(encoding="utf-8").splitlines()[: options.train_rows]
        (folder / f"{task}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        files[task] = {"train": str(folder / f"{task}.jsonl")}
    run = {
        "model": {"name": "demo-encoder", "device": "cpu"},
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"valid_split": 0},
        "tasks": {"data": files, "gate": {"mode": "inferred"}},
        "train": {
            "objective": "classification", "steps": options.steps, "batch_size": 16, "micro_batch_size": 16, "lr": 1e-3,
            "precision": "fp32", "seed": options.seed, "evaluate_every": None, "save_every": None,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    rw.train(run)
    return folder / "run"


def stream(opened: Opened, options: argparse.Namespace) -> list[Request]:
    """Requests in runs of random length, without a row twice, until there are enough or one task has none left."""
    head = target_head(opened.target)
    assert head is not None and head.labels is not None
    draws = np.random.default_rng(options.seed)
    left = {
        task: list(draws.permutation((DATA / task / "test.jsonl").read_text(encoding="utf-8").splitlines()))
        for task in TASKS
    }
    found: list[Request] = []
    task, run = TASKS[int(draws.integers(len(TASKS)))], 0
    while len(found) < options.requests and left[task]:
        for place in range(int(draws.geometric(1 / options.run_length))):
            if left[task] and len(found) < options.requests:
                row = json.loads(left[task].pop())
                ids = opened.tokenizer(row["text"], truncation=True, max_length=128)["input_ids"]
                found.append(Request(task, ids, head.labels.names.index(row["label"]), run, place == 0 and run > 0))
        others = [name for name in TASKS if name != task]
        task, run = others[int(draws.integers(len(others)))], run + 1
    return found


def answer(model: PreTrainedModel, request: Request, policy: str, give: object) -> None:
    """Reads the request under what is given (None: nothing is), notes time, loss and label."""
    ids = torch.tensor([request.ids])
    cpu, wall = time.process_time(), time.perf_counter()
    rw.set_task(model, give)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    request.times[policy] = time.process_time() - cpu, time.perf_counter() - wall
    request.losses[policy] = float(F.cross_entropy(logits, torch.tensor(request.label)))
    request.right[policy] = int(logits.argmax()) == request.label


def serve(model: PreTrainedModel, requests: list[Request], pad_id: int) -> None:
    """Answers the stream under each policy, request by request; which comes first turns by one each time.

    An answer under `smoothed` is that of the adapter which it chose, given by its id.
    """
    mixture = mixture_of(model)
    assert mixture.router_weight is not None and mixture.router_bias is not None
    smoothed = torch.zeros(len(TASKS))
    for number, request in enumerate(requests):
        state = states_of(model, [request.ids], pad_id)[0]
        smoothed = 0.5 * smoothed + state @ mixture.router_weight.T + mixture.router_bias
        request.routes = {"given": request.task, "smoothed": TASKS[int(smoothed.argmax())]}
        gives = {"given": request.task, "inferred": None, "uniform": dict.fromkeys(TASKS, 1 / len(TASKS))}
        order = tuple(gives)
        for policy in order[number % 3 :] + order[: number % 3]:
            answer(model, request, policy, gives[policy])
            if policy == "inferred":
                assert mixture.routing.inferred is not None
                request.routes["inferred"] = TASKS[int(mixture.routing.inferred[0])]
        known = [policy for policy in ("given", "inferred") if request.routes[policy] == request.routes["smoothed"]]
        if known:
            request.losses["smoothed"], request.right["smoothed"] = request.losses[known[0]], request.right[known[0]]
        else:
            answer(model, request, "smoothed", request.routes["smoothed"])
        same = request.routes["inferred"] == request.task
        assert not same or abs(request.losses["inferred"] - request.losses["given"]) < 1e-3, "the same adapter"


def interval(requests: list[Request], statistic: Callable[[list[Request]], float]) -> dict[str, object]:
    """The statistic, and its interval from drawing whole runs again."""
    runs: dict[int, list[Request]] = {}
    for request in requests:
        runs.setdefault(request.run, []).append(request)
    every, draws = list(runs.values()), np.random.default_rng(0)
    values = [
        statistic([request for place in draws.integers(len(every), size=len(every)) for request in every[place]])
        for _ in range(DRAWS)
    ]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return {"value": statistic(requests), "low": float(low), "high": float(high), "n": len(requests)}


def mean_of(value: Callable[[Request], float]) -> Callable[[list[Request]], float]:
    """The mean of a figure of requests; not a number for none."""
    return lambda requests: float(np.mean([value(one) for one in requests])) if requests else float("nan")


def first_less_later(value: Callable[[Request], float]) -> Callable[[list[Request]], float]:
    """Its mean just after a switch less that of later requests; of runs of both kinds."""
    mean = mean_of(value)
    return lambda rs: mean([r for r in rs if r.is_first]) - mean([r for r in rs if not r.is_first])


def figures(requests: list[Request]) -> list[dict[str, object]]:
    """The lines of the result."""
    lengths: dict[int, int] = {}
    for request in requests:
        lengths[request.run] = lengths.get(request.run, 0) + 1
    paired = [request for request in requests if request.run > 0 and lengths[request.run] > 1]
    rows: list[dict[str, object]] = []
    for policy in ("inferred", "smoothed"):
        routed = lambda r, policy=policy: float(r.routes[policy] == r.task)  # noqa: E731 (a figure of a request)
        rows.append({"what": f"{policy}: routed right", **interval(requests, mean_of(routed))})
        firsts = [request for request in requests if request.is_first]
        rows.append({"what": f"{policy}: routed right, first", **interval(firsts, mean_of(routed))})
        rows.append({"what": f"{policy}: routed right, first less later", **interval(paired, first_less_later(routed))})
    for policy in POLICIES:
        loss = lambda r, policy=policy: r.losses[policy]  # noqa: E731
        right = lambda r, policy=policy: float(r.right[policy])  # noqa: E731
        excess = lambda r, policy=policy: r.losses[policy] - r.losses["given"]  # noqa: E731
        rows.append({"what": f"{policy}: loss", **interval(requests, mean_of(loss))})
        rows.append({"what": f"{policy}: accuracy", **interval(requests, mean_of(right))})
        if policy != "given":
            rows.append({"what": f"{policy}: excess loss", **interval(requests, mean_of(excess))})
            rows.append(
                {"what": f"{policy}: excess loss, first less later", **interval(paired, first_less_later(excess))}
            )
    times = {policy: [request.times[policy] for request in requests] for policy in ("given", "inferred")}
    for policy, clock in (("given", 0), ("inferred", 0)):
        median = float(np.median([pair[clock] for pair in times[policy]]))
        rows.append({"what": f"{policy}: cpu seconds a request", "value": median, "n": len(requests)})
    found = ratio(times, "inferred", "given")
    rows.append(
        {"what": "inferred / given: cpu time", "value": found["median"], "low": found["low"], "high": found["high"],
         "n": found["pairs"]}
    )  # fmt: skip
    return rows


def main() -> None:
    """Trains, serves the stream, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160, help="of training, 16 rows each, for all adapters together")
    parser.add_argument("--train-rows", type=int, default=1500, help="of each task, at most")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--run-length", type=float, default=6.0, help="requests between two switches, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = trained(Path(folder), options)
        opened = open_target(find_target(str(run), device="cpu"), "fp32")
        requests = stream(opened, options)
    model = opened.model
    serve(model, requests, opened.tokenizer.pad_token_id)
    router = mixture_of(model).router_report or {}
    head = header(**settings_of("task_stream", options), held_out_routed_right=router.get("accuracy"))
    rows = figures(requests)
    print(json.dumps(head))
    for row in rows:
        bounds = f" [{row['low']:.4f}, {row['high']:.4f}]" if "low" in row else ""
        print(f"{row['what']:<48} {row['value']:.4f}{bounds}  (n {row['n']})")
    if options.out is not None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"header": head, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
