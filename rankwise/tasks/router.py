"""The classifier of an inferred gate: which task a row is of, by logistic regression on the base's pooled hidden state.

Multinomial logistic regression with every task counted alike, whatever its number of rows, and the square penalty
|W|^2 / 2n (scikit-learn's C = 1), minimised by scipy's L-BFGS-B from zeros: one minimum, so the same rows and seed give
the same classifier. Features are standardised, and that is taken into the weights. The seed chooses the rows that are
held out and never trained on; what is reported is measured on them.

Legend: N rows, d width of the hidden state, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.attach.gate_folder import set_router
from rankwise.attach.gates import mixture_of
from rankwise.attach.inferring import pooled_states
from rankwise.errors import RequestError
from rankwise.models.probing import num_positions

HELD_OUT = 0.2
"""Share of each task's rows that the accuracy is measured on."""
MOST_ITERATIONS = 500

Rows = Sequence[Sequence[int]]
"""Token ids of each row."""


def states_of(model: PreTrainedModel, rows: Rows, pad_id: int, batch_size: int = 16) -> Float[Tensor, "N d"]:
    """The base's pooled hidden state of each row, on the CPU; rows longer than the model's positions are cut there.

    Raises: RequestError for a row without tokens.
    """
    empty = next((place for place, row in enumerate(rows, start=1) if not row), None)
    if empty is not None:
        raise RequestError(f"row {empty} has no tokens, so its task can't be inferred")
    longest = num_positions(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        cut = [list(rows[i])[:longest] for i in chosen]
        width = max(len(row) for row in cut)
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in cut], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in cut], device=model.device)
        found.update(zip(chosen, pooled_states(model, ids, mask).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def inferred_tasks(model: PreTrainedModel, rows: Rows, pad_id: int, batch_size: int = 16) -> Int64[Tensor, " N"]:
    """The number of the task that the gate's classifier finds for each row.

    Raises: RequestError for a gate without a classifier, or a row without tokens.
    """
    mixture = mixture_of(model)
    if mixture.router_weight is None or mixture.router_bias is None:
        raise RequestError("this gate has no classifier that could infer a task; fit one, or give tasks")
    states = states_of(model, rows, pad_id, batch_size)
    return (states @ mixture.router_weight.cpu().T + mixture.router_bias.cpu()).argmax(-1)


def fit_router(
    model: PreTrainedModel, rows: Mapping[str, Rows], pad_id: int, seed: int = 0, batch_size: int = 16
) -> dict[str, Any]:
    """Fits the classifier of the attached inferred gate, and says how well it does on rows that it has not seen.

    Args:
        model: with an inferred gate attached.
        rows: by task: the token ids of what is read before an answer (prompts, or whole texts). Two at least.
        pad_id: of the tokenizer.
        seed: chooses the rows that are held out.
        batch_size: rows at a time.

    Returns `accuracy` (0 to 1), `accuracy_by_task`, `rows` and `held_out` by task, `seed`, `pooling`.

    Raises: RequestError for a gate of another mode, a task without rows, or one that the gate does not have.
    """
    mixture = mixture_of(model)
    if mixture.gate is None or mixture.gate.mode != "inferred":
        raise RequestError("only a gate of mode 'inferred' has a classifier to fit; attach one")
    for task in rows:
        mixture.number(task)
    short = next((task for task in mixture.tasks if len(rows.get(task, ())) < 2), None)
    if short is not None:
        raise RequestError(f"task '{short}' has {len(rows.get(short, ()))} rows; its classifier needs two or more")
    generator = torch.Generator().manual_seed(seed)
    features, targets, is_held = [], [], []
    for number, task in enumerate(mixture.tasks):
        own = rows[task]
        held = max(1, round(HELD_OUT * len(own)))
        order = torch.randperm(len(own), generator=generator)
        features.append(states_of(model, own, pad_id, batch_size)[order])
        targets.append(torch.full((len(own),), number))
        is_held.append(torch.arange(len(own)) < held)
    x, y, test = torch.cat(features), torch.cat(targets), torch.cat(is_held)
    weight, bias = logistic_regression(x[~test], y[~test], len(mixture.tasks))
    right = (x[test] @ weight.T + bias).argmax(-1) == y[test]
    report = {
        "accuracy": float(right.double().mean()),
        "accuracy_by_task": {
            task: float(right[y[test] == number].double().mean()) for number, task in enumerate(mixture.tasks)
        },
        "rows": {task: len(rows[task]) for task in mixture.tasks},
        "held_out": {task: int((y[test] == number).sum()) for number, task in enumerate(mixture.tasks)},
        "seed": seed,
        "pooling": "mean",
    }
    set_router(model, weight, bias, report)
    return report


def logistic_regression(
    x: Float[Tensor, "N d"], y: Int64[Tensor, " N"], num_tasks: int
) -> tuple[Float[Tensor, "T d"], Float[Tensor, " T"]]:
    """Weights and biases that minimise the mean cross entropy, tasks counted alike, plus |W|^2 / 2N; see the module."""
    mean, scale = x.double().mean(0), x.double().std(0, correction=0).clamp_min(1e-8)
    features = ((x.double() - mean) / scale).numpy()
    targets, number, width = y.numpy(), len(x), x.shape[1]
    counts = np.bincount(targets, minlength=num_tasks).clip(1)
    importance = (1.0 / counts)[targets]
    importance /= importance.sum()
    one_hot = np.eye(num_tasks)[targets]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        W, b = flat[: num_tasks * width].reshape(num_tasks, width), flat[num_tasks * width :]
        log_p = log_softmax(features @ W.T + b, axis=1)
        error = importance[:, None] * (np.exp(log_p) - one_hot)
        value = -(importance * log_p[np.arange(number), targets]).sum() + (W**2).sum() / (2 * number)
        return float(value), np.concatenate([(error.T @ features + W / number).ravel(), error.sum(0)])

    start = np.zeros(num_tasks * (width + 1))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MOST_ITERATIONS}).x
    W = torch.from_numpy(found[: num_tasks * width].reshape(num_tasks, width).copy()) / scale
    b = torch.from_numpy(found[num_tasks * width :].copy()) - W @ mean
    return W.float(), b.float()
