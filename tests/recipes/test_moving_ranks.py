"""Runs whose ranks move: what is written, that the loss has no jump, and that going on is the straight run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankwise.attach.checkpoint import load_adapter, read_nested
from rankwise.attach.inject import adapter_parameters, ranks
from rankwise.errors import RequestError
from rankwise.ranks.nested import set_prefix
from rankwise.recipes import finetune, rank_movers
from rankwise.recipes.convert_rank import convert_rank
from rankwise.recipes.finetune import train
from rankwise.recipes.rank_map import rank_map
from rankwise.train.interrupt import Interrupted
from rankwise.train.loop import Step
from rankwise.train.state import checkpoint_folders
from tests import tiny
from tests.processes import Processes
from tests.recipes.runs import adapter_bytes, interrupting, metrics, settings, unmeasured

GROW = {"policy": "grow", "start": 2, "max": 6, "by": 2, "every": 4, "where": "all"}
STEPS = (4, 8)
"""After which the ranks of `GROW` move in 12 steps; the last 20 % they stay."""


def growing(files: Path, output: Path, ranks: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return settings(files, output, ranks=GROW | (ranks or {}), **sections)


def moved(output: Path) -> dict[int, dict[str, int]]:
    return {line["step"]: line["ranks"] for line in metrics(output) if "ranks" in line}


def same_files(one: Path, other: Path) -> None:
    assert adapter_bytes(one) == adapter_bytes(other)
    configs = [(path / "adapter" / "adapter_config.json").read_bytes() for path in (one, other)]
    assert configs[0] == configs[1]
    assert unmeasured(metrics(one)) == unmeasured(metrics(other))
    states = [load_file(checkpoint_folders(path)[-1] / "state.safetensors") for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_ranks_grow_by_the_plan_and_the_folder_is_pefts(files: Path, tmp_path: Path) -> None:
    summary = train(growing(files, tmp_path / "out"), quiet=True)
    history = moved(tmp_path / "out")
    assert {step: set(now.values()) for step, now in history.items()} == {4: {4}, 8: {6}}
    model = load_adapter(tiny.llama(), tmp_path / "out" / "adapter")
    assert ranks(model) == history[8]
    assert summary["trainable_parameters"] == sum(p.numel() for p in adapter_parameters(model).values())
    fields = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == 2 and set(fields["rank_pattern"].values()) == {6} and fields["lora_alpha"] == 8
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "out" / "adapter")(tiny.token_ids()).logits
        assert torch.allclose(model(tiny.token_ids()).logits, theirs, atol=1e-5)


def test_the_map_of_ranks_is_drawn_where_they_are_not_one(
    files: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a policy, with its history, and by a pattern; not where all ranks are one and stay."""
    drawn = []
    draw_map = finetune.draw_map
    monkeypatch.setattr(finetune, "draw_map", lambda *what: drawn.append(what) or draw_map(*what))
    short = {"steps": 3}
    moving = {"start": 2, "max": 4, "by": 2, "every": 2}
    grown = train(growing(files, tmp_path / "grown", ranks=moving, train=short), quiet=True)
    train(settings(files, tmp_path / "patterned", adapter={"rank_pattern": {"q_proj": 3}}, train=short), quiet=True)
    (found, history, _), (other, none, _) = drawn
    assert found.ranks == rank_map(moved(tmp_path / "grown")[2]).ranks and [entry["step"] for entry in history] == [2]
    assert set(other.ranks.values()) == {3, 4} and none == []
    for name in ("grown", "patterned"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        picture = tmp_path / name / "ranks.png"
        assert summary["rank_map"] == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    assert grown["rank_map"] == str(tmp_path / "grown" / "ranks.png")
    assert json.loads((straight / "summary.json").read_text())["rank_map"] is None
    assert not (straight / "ranks.png").exists()


def test_a_growth_makes_no_jump_and_the_rates_go_on(
    files: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, groups = [], []
    set_ranks = rank_movers.set_ranks

    def watched(model, new, optimizer, generator, alpha):
        def loss() -> float:
            model.eval()
            with torch.no_grad():
                return model(tiny.token_ids(), labels=tiny.token_ids()).loss.item()

        before = loss()
        set_ranks(model, new, optimizer, generator, alpha=alpha)
        losses.append((before, loss()))
        trained = {id(p) for p in adapter_parameters(model).values()}
        assert trained == {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups.append([(g["weight_decay"], g["lr_ratio"], len(g["params"])) for g in optimizer.param_groups])

    monkeypatch.setattr(rank_movers, "set_ranks", watched)
    changes = {"weight_decay": 0.1, "loraplus_ratio": 4.0}
    train(growing(files, tmp_path / "out", train=changes), quiet=True)
    assert len(losses) == 2 and all(abs(a - b) < 1e-6 * abs(a) for a, b in losses)
    assert groups == [[(0.1, 1.0, 14), (0.1, 4.0, 14)]] * 2
    assert [line["lr"] for line in metrics(tmp_path / "out")] == [line["lr"] for line in metrics(straight)]


@pytest.mark.parametrize("stop", [4, 5])
def test_going_on_is_the_straight_run_wherever_it_stopped(files: Path, tmp_path: Path, grown: Path, stop: int) -> None:
    run = growing(files, tmp_path / "halves")
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(stop), quiet=True)
    train(run, resume=True, quiet=True)
    same_files(tmp_path / "halves", grown)


@pytest.fixture(scope="module")
def grown(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("grown") / "out"
    train(growing(files, output), quiet=True)
    return output


def test_a_kill_between_the_growth_and_its_checkpoint(files: Path, tmp_path: Path, grown: Path) -> None:
    run = growing(files, tmp_path / "out")

    def die(step: Step) -> None:
        if step.number == 8:
            assert "ranks" in step.metrics
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, on_step=die, quiet=True)
    assert checkpoint_folders(tmp_path / "out")[-1].name == "step-6" and 8 in moved(tmp_path / "out")
    assert train(run, resume=True, quiet=True)["resumed_from"] == 6
    same_files(tmp_path / "out", grown)


ADAPTIVE = {
    "ranks": {"policy": "adaptive", "start": 4, "budget": 4 * 928 + 100, "every": 1, "settle": 0.1},
    "train": {"steps": 24, "save_every": 6},
}
NESTED = {"ranks": {"policy": "nested", "min": 2}, "adapter": {"r": 6}}


@pytest.mark.parametrize("changes", [ADAPTIVE, NESTED], ids=["adaptive", "nested"])
def test_other_policies_go_on_as_the_straight_run(files: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(settings(files, tmp_path / "straight", **changes), quiet=True)
    run = settings(files, tmp_path / "halves", **changes)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(15 if changes is ADAPTIVE else 7), quiet=True)
    train(run, resume=True, quiet=True)
    same_files(tmp_path / "halves", tmp_path / "straight")
    assert len(moved(tmp_path / "straight")) == (0 if changes is NESTED else len(moved(tmp_path / "halves")))
    if changes is ADAPTIVE:
        history = moved(tmp_path / "straight")
        assert min(history) == 10 and max(history) <= 21, "components are judged after ten steps; the last rest"
        size = json.loads((tmp_path / "straight" / "summary.json").read_text())["trainable_parameters"]
        assert size <= 4 * 928 + 100 and len(set(history[max(history)].values())) > 1


def test_two_processes_adapt_as_one(files: Path, tmp_path: Path, two_processes: Processes) -> None:
    changes = {**ADAPTIVE, "adapter": {"lora_dropout": 0.0}}
    changes["train"] = {**ADAPTIVE["train"], "max_grad_norm": 0, "share_optimizer_from": 1, "steps": 14}
    train(settings(files, tmp_path / "one", **changes), quiet=True)
    two_processes(_train, settings(files, tmp_path / "two", **changes))
    assert moved(tmp_path / "one") == moved(tmp_path / "two") and moved(tmp_path / "one")


def test_a_nested_run_is_cut_at_no_cost(files: Path, tmp_path: Path) -> None:
    train(settings(files, tmp_path / "out", **NESTED), quiet=True)
    assert read_nested(tmp_path / "out" / "adapter") == {"least": 2, "most": 6}
    assert read_nested(checkpoint_folders(tmp_path / "out")[-1] / "adapter") == {"least": 2, "most": 6}
    cut = convert_rank(str(tmp_path / "out"), str(tmp_path / "cut"), rank=3)
    assert cut["method"] == "prefix" and cut["max_rank"] == 3
    whole = load_adapter(tiny.llama(), tmp_path / "out" / "adapter")
    set_prefix(whole, 3)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "cut")(tiny.token_ids()).logits
        assert torch.allclose(whole(tiny.token_ids()).logits, theirs, atol=1e-5)
    below = convert_rank(str(tmp_path / "out"), str(tmp_path / "one"), rank=1)
    assert below["method"] == "svd", "it was not trained for rank 1"
    with pytest.raises(RequestError, match="--rank 1 is below 2, the least"):
        convert_rank(str(tmp_path / "out"), str(tmp_path / "new"), rank=1, method="prefix")
    with pytest.raises(RequestError, match="takes --rank"):
        convert_rank(str(tmp_path / "out"), str(tmp_path / "new"), energy=0.5, method="prefix")


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": {"measure": "gradient", "where": "top-5", "every": 2}, "train": {"gradient_checkpointing": True}},
        {
            "ranks": {"every": "1 epoch", "where": "saturated"},
            "data": {"packing": False},
            "adapter": {"use_dora": True, "init_lora_weights": "pissa", "use_rslora": True},
        },
        {"ranks": {"alpha": "scale", "where": "top-5"}, "train": {"optimizer": "adamw-fused"}},
        pytest.param(
            {"ranks": {"alpha": "scale", "where": "top-5"}, "train": {"precision": "bf16"}}, marks=pytest.mark.slow
        ),
    ],
    ids=["gradient-checkpointing", "dora-pissa-epochs-saturated", "one-scale-fused", "one-scale-bf16"],
)
def test_going_on_with_all_that_is_kept_by_parameter(files: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    train(growing(files, tmp_path / "straight", **changes), quiet=True)
    assert moved(tmp_path / "straight"), "something grew"
    run = growing(files, tmp_path / "halves", **changes)
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(7), quiet=True)
    train(run, resume=True, quiet=True)
    same_files(tmp_path / "halves", tmp_path / "straight")


def test_a_budget_is_met_and_not_exceeded(files: Path, tmp_path: Path) -> None:
    start = 2 * 928  # parameters of rank 1, twice
    run = growing(files, tmp_path / "out", {"budget": start + 1000, "every": 1, "by": 1})
    seen: list[int] = []
    summary = train(run, on_step=lambda step: seen.append(len(step.metrics.get("ranks", {}))), quiet=True)
    assert start + 1000 - 80 < summary["trainable_parameters"] <= start + 1000
    assert any(seen) and not all(seen)


def test_two_processes_grow_as_one(files: Path, tmp_path: Path, two_processes: Processes) -> None:
    """By gradients, which each process has its own share of."""
    changes = {"adapter": {"lora_dropout": 0.0}, "train": {"max_grad_norm": 0, "share_optimizer_from": 1}}
    how = {"measure": "gradient", "where": "top-6"}
    train(growing(files, tmp_path / "one", how, **changes), quiet=True)
    two_processes(_train, growing(files, tmp_path / "two", how, **changes))
    assert moved(tmp_path / "one") == moved(tmp_path / "two") and len(moved(tmp_path / "one")) == 2
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def _train(run: dict[str, Any]) -> None:
    train(run, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"start": None}, "adapter": {"r": 8}}, "adapter.r gives .* the rank 8, above ranks.max \\(6\\)"),
        ({"ranks": {"start": 6}}, "no layer can grow"),
        ({"ranks": {"budget": 1000}}, "ranks.budget \\(1,000 parameters\\) is below what the adapter has"),
        ({"ranks": {"budget": 10**9}}, "has no effect: all layers at their highest rank are within it"),
        ({"ranks": {"every": 11}}, "ranks.every \\(11\\) and ranks.settle \\(0.2\\) leave no step of 12"),
        ({"ranks": {"settle": 0.9}}, "leave no step of 12"),
        ({"train": {"optimizer": "adamw-8bit"}}, "adamw-8bit keeps its state in blocks"),
        ({"adapter": {"rank_pattern": {"q_proj": 3}}}, "ranks.start \\(2\\) and adapter.rank_pattern both say"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(
    files: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        train(growing(files, tmp_path / "out", **changes), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"policy": "adaptive", "budget": 100}}, r"ranks.budget \(100 parameters\) is below what"),
        ({"ranks": {"policy": "adaptive", "budget": "1 GB"}}, "has no effect: all layers at their highest rank"),
        ({"ranks": {"policy": "nested", "min": 4}}, r"nothing to nest: ranks.min \(4\)"),
        ({"ranks": {"policy": "nested"}, "adapter": {"init_lora_weights": "pissa"}}, "does not go with .*pissa"),
    ],
)
def test_what_other_policies_refuse(files: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        train(settings(files, tmp_path / "out", **changes), quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_exists_grows_from_where_it_is(files: Path, tmp_path: Path, grown: Path) -> None:
    start = {"adapter": {"from": str(grown / "adapter")}}
    with pytest.raises(RequestError, match=r"ranks.start \(2\) has no effect with adapter.from"):
        train({**growing(files, tmp_path / "out"), **start}, quiet=True)
    train({**growing(files, tmp_path / "out", {"start": None, "max": 7}), **start}, quiet=True)
    assert set(moved(tmp_path / "out")[4].values()) == {7}


def test_another_length_that_would_have_grown_otherwise_is_refused(files: Path, tmp_path: Path) -> None:
    run = growing(files, tmp_path / "out", train={"schedule": "constant", "warmup": 0})
    with pytest.raises(Interrupted):
        train(run, on_step=interrupting(10), quiet=True)
    longer = growing(files, tmp_path / "out", {"settle": 0.5}, train={"schedule": "constant", "warmup": 0, "steps": 12})
    with pytest.raises(RequestError, match="settle was"):
        train(longer, resume=True, quiet=True)
    longer = growing(files, tmp_path / "out", train={"schedule": "constant", "warmup": 0, "steps": 11})
    train(longer, resume=True, quiet=True)
    assert sorted(moved(tmp_path / "out")) == [4, 8]


def test_a_shorter_run_that_would_have_stopped_growing(files: Path, tmp_path: Path) -> None:
    constant = {"schedule": "constant", "warmup": 0}
    with pytest.raises(Interrupted):
        train(growing(files, tmp_path / "out", train=constant), on_step=interrupting(9), quiet=True)
    with pytest.raises(RequestError, match="its ranks would have moved otherwise after step 8"):
        train(growing(files, tmp_path / "out", train={**constant, "steps": 9}), resume=True, quiet=True)
