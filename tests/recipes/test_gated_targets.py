"""The commands on a folder of several adapters: generate, chat, evaluate, merge, inspect."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.adapters.gate_config import GateConfig
from rankwise.attach.checkpoint import read_config
from rankwise.attach.gate_folder import read_gate_folder
from rankwise.attach.inferring import pooled_states
from rankwise.cli.main import main
from rankwise.data.formats import Turn
from rankwise.data.templates import render_prompt
from rankwise.errors import RequestError
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.generate import open_session
from rankwise.recipes.merge import merge
from rankwise.recipes.target import find_adapter, find_target, target_tokenizer
from rankwise.tasks.router import fit_router, inferred_tasks
from tests.attach.gate_cases import disturbed
from tests.recipes.trained import figures, rows, save_model, write_rows
from tests.test_docs import check_fields

TASKS = ("loud", "quiet")
PROMPTS = {"loud": [f"SHOUT {i} NOW" for i in range(20)], "quiet": [f"whisper {i} later" for i in range(20)]}


def rendered(base) -> dict[str, list[list[int]]]:
    """The prompts as the model is given them, in tokens."""
    target = find_target(str(base))
    tokenizer, data = target_tokenizer(target), target.data_config()
    return {
        task: [render_prompt(tokenizer, [Turn("user", prompt)], data)[1] for prompt in prompts]
        for task, prompts in PROMPTS.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, two adapters of it, and gates of these."""
    root = tmp_path_factory.mktemp("gated")
    base = save_model(root / "model")
    config = rw.LoraConfig(r=3, lora_alpha=6)
    for seed, task in enumerate(TASKS):
        model = disturbed(rw.attach(AutoModelForCausalLM.from_pretrained(base), config), seed, 0.15)
        rw.save_adapter(model, root / task)
    adapters = {task: root / task for task in TASKS}
    for mode in ("hard", "soft", "inferred"):
        model = rw.attach_gate(AutoModelForCausalLM.from_pretrained(base), adapters, GateConfig(mode))
        if mode == "soft":
            model.rankwise_attachment.mixture.logits.data += torch.tensor([0.7, -0.2])
        if mode == "inferred":
            report = fit_router(model.eval(), rendered(base), 259)
            assert report["accuracy"] == 1.0 and report["held_out"] == {"loud": 4, "quiet": 4}
        rw.save_adapter(model, root / mode)
    model = rw.attach_embedding(AutoModelForCausalLM.from_pretrained(base), root / "loud", TASKS)
    rw.save_adapter(disturbed(model, 4), root / "vectors")
    write_rows(root / "data.jsonl", rows(4))
    return root


def answers(target, *prompts, task=None):
    session = open_session(str(target), device="cpu", precision="fp32", task=task)
    return session.answer_all(list(prompts), None, 6, 4)


def test_generating_with_a_task_is_that_adapter(made):
    prompts = ("Capitals: oak", "Capitals: reed")
    alone = {task: answers(made / task, *prompts) for task in TASKS}
    assert alone["loud"] != alone["quiet"]
    for mode in ("hard", "soft", "inferred"):
        for task in TASKS:
            assert answers(made / mode, *prompts, task=task) == alone[task]
    with pytest.raises(RequestError, match="is a hard gate: say by --task which of loud, quiet"):
        answers(made / "hard", *prompts)
    with pytest.raises(RequestError, match="set of task embeddings: say by --task"):
        answers(made / "vectors", *prompts)
    assert answers(made / "soft", *prompts), "a learned mixture answers without a task"


def test_generate_and_chat_by_task_on_the_command_line(made, capsys, monkeypatch):
    plain = ["--max-new-tokens", "6", "--precision", "fp32", "--device", "cpu", "--json"]
    prompt = "Capitals: oak"
    for task in TASKS:
        expected = answers(made / task, prompt)[0]
        capsys.readouterr()
        assert main(["generate", str(made / "hard"), "--task", task, "--prompt", prompt, *plain]) == 0
        assert json.loads(capsys.readouterr().out)["results"] == [{"prompt": prompt, "answer": expected}]
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n/base\n/reset\n{prompt}\n/quit\n"))
        assert main(["chat", str(made / "hard"), "--task", task, *plain]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["messages"][0]["content"] == prompt and expected in said.err
    for command in (["chat", str(made / "hard")], ["generate", str(made / "hard"), "--prompt", prompt]):
        assert main([*command, *plain]) == 2
        assert "say by --task which of loud, quiet" in json.loads(capsys.readouterr().out)["error"]["message"]
        assert main([*command, "--task", "lod", *plain]) == 2
        assert "did you mean 'loud'" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_inferred_gate_finds_the_task_of_each_row_and_keeps_it(made):
    prompts = [PROMPTS["quiet"][3], PROMPTS["loud"][5], "whisper 99"]
    session = open_session(str(made / "inferred"), device="cpu", precision="fp32")
    model, tokenizer = session.opened.model, session.opened.tokenizer
    ids = [render_prompt(tokenizer, [Turn("user", p)], session.opened.target.data_config())[1] for p in prompts]
    found = inferred_tasks(model, ids, tokenizer.pad_token_id)
    got = session.answer_all(prompts, None, 6, 3)
    for prompt, number, answer in zip(prompts, found.tolist(), got, strict=True):
        assert answers(made / TASKS[number], prompt) == [answer]
    assert len(set(found.tolist())) == 2, "both tasks are found"


def test_padding_on_either_side_changes_no_pooled_state(made):
    model = rw.load_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "inferred").eval()
    row, filler = torch.randint(0, 250, (1, 7)), torch.full((1, 3), 259)
    ones, zeros = torch.ones(1, 7, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    alone = pooled_states(model, row)
    left = pooled_states(model, torch.cat([filler, row], 1), torch.cat([zeros, ones], 1))
    right = pooled_states(model, torch.cat([row, filler], 1), torch.cat([ones, zeros], 1))
    assert torch.allclose(left, alone, atol=1e-5) and torch.allclose(right, alone, atol=1e-5)


def test_packed_rows_are_not_inferred(made):
    model = rw.load_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "inferred").eval()
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(RequestError, match="packed rows hold several samples"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long), position_ids=positions)


def measured(target, data, **more):
    config = EvaluateConfig(data=str(data), precision="fp32", metrics=("loss",), **more)
    document = evaluate(str(target), config, device="cpu")
    return {entry["target"]: entry for entry in document["results"]}


@pytest.fixture(scope="module")
def singles(made):
    """The figures of each adapter by itself, and of its base."""
    return {task: measured(made / task, made / "data.jsonl") for task in TASKS}


@pytest.mark.parametrize("mode", ["hard", "soft", "inferred"])
def test_evaluating_a_gate_reports_each_adapter_the_mean_and_the_gate(made, singles, mode):
    data = made / "data.jsonl"
    found = measured(made / mode, data, task="quiet")
    expected = ["base", "task:loud", "task:quiet", "uniform", "adapter"]
    for entry in found.values():
        check_fields("evaluate", entry)
    assert list(found) == expected + (["inferred"] if mode == "inferred" else [])
    for task in TASKS:
        assert found[f"task:{task}"]["loss"] == pytest.approx(singles[task]["adapter"]["loss"], rel=1e-5)
    assert found["base"]["loss"] == pytest.approx(singles["loud"]["base"]["loss"])
    assert len({entry["loss"] for entry in found.values()}) >= 4
    if mode != "soft":
        assert figures(found["adapter"]) == figures(found["task:quiet"])
    if mode == "inferred":
        assert found["inferred"]["routing_accuracy"] == found["inferred"]["routed"]["quiet"]
        assert math.isclose(sum(found["inferred"]["routed"].values()), 1.0)
        alone = measured(made / mode, data)["adapter"]
        assert alone["loss"] == found["inferred"]["loss"] and "routing_accuracy" not in alone


def test_a_routed_row_is_measured_under_its_own_task(made, tmp_path):
    """The loss over rows that go to different adapters is the mean of theirs by tokens."""
    documents = [{"prompt": p, "completion": "ok"} for p in (PROMPTS["loud"][0], PROMPTS["quiet"][0])]
    both = measured(made / "inferred", write_rows(tmp_path / "both.jsonl", documents))["adapter"]
    losses = []
    for place, document in enumerate(documents):
        one = write_rows(tmp_path / f"{place}.jsonl", [document])
        routed = measured(made / "inferred", one)["adapter"]
        task = max(routed["routed"], key=routed["routed"].get)
        losses.append(measured(made / task, one)["adapter"]["loss"])
        assert losses[-1] == pytest.approx(routed["loss"], rel=1e-5)
    assert both["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_evaluating_needs_a_task_where_the_gate_does(made):
    with pytest.raises(RequestError, match="say by --task"):
        measured(made / "hard", made / "data.jsonl")
    with pytest.raises(RequestError, match="has no task 'qui'; did you mean 'quiet'"):
        measured(made / "hard", made / "data.jsonl", task="qui")
    with pytest.raises(RequestError, match="--task quiet has no effect"):
        measured(made / "loud", made / "data.jsonl", task="quiet")
    assert list(measured(made / "vectors", made / "data.jsonl", task="quiet"))[-1] == "adapter"


def test_merging_folds_first(made, tmp_path):
    document = merge(str(made / "hard"), str(tmp_path / "merged"), device="cpu", task="loud")
    assert document["certificate"]["kl"] < 1e-6
    merge(str(made / "loud"), str(tmp_path / "plain"), device="cpu")
    ids = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / n)(ids).logits for n in ("merged", "plain"))
    assert torch.allclose(ours, plain, atol=1e-5)
    with pytest.raises(RequestError, match="choose one by --task"):
        merge(str(made / "hard"), str(tmp_path / "none"), device="cpu")
    merge(str(made / "soft"), str(tmp_path / "mixture"), device="cpu")
    assert not (tmp_path / "none").exists()


def test_those_who_need_one_adapter_say_so(made):
    with pytest.raises(RequestError, match=r"holds several adapters \(loud, quiet\) under a gate: fold them"):
        find_adapter(str(made / "hard"))
    with pytest.raises(RequestError, match="holds several adapters under a gate, not one"):
        read_config(made / "hard")
    with pytest.raises(RequestError, match="is a gate itself"):
        rw.attach_gate(AutoModelForCausalLM.from_pretrained(made / "model"), {"a": made / "hard", "b": made / "loud"})


@pytest.mark.parametrize("what", ["hard", "soft", "inferred", "vectors"])
def test_inspecting_a_gate(made, what, capsys, tmp_path):
    picture = ["--picture", str(tmp_path / "map.svg")] if what == "soft" else []  # of all the same map
    assert main(["inspect", str(made / what), "--json", *picture]) == 0
    document = json.loads(capsys.readouterr().out)
    check_fields("inspect", document)
    check_fields("inspect", document["modules"][0])
    assert document["kind"] == ("task-embeddings" if what == "vectors" else "gate")
    assert document["tasks"] == list(TASKS) and document["base"] == str(made / "model")
    layers = 14
    assert len(document["modules"]) == (layers if what == "vectors" else 2 * layers)
    assert set(document["ranks"].values()) == {3 if what == "vectors" else 6}
    if what == "soft":
        assert sum(document["shares"]["global"].values()) == pytest.approx(1.0, abs=1e-6)
    if what == "inferred":
        assert document["router"]["accuracy"] == 1.0
    if what == "vectors":
        assert set(document["vectors"]) == set(TASKS)
    assert main(["inspect", str(made / what)]) == 0
    assert "2 tasks: loud, quiet" in capsys.readouterr().out


def test_the_commands_take_a_task(made, capsys, monkeypatch):
    end = ["--device", "cpu", "--precision", "fp32", "--json"]
    arguments = ["generate", str(made / "hard"), "--task", "loud", "--prompt", "Capitals: oak", "--max-new-tokens", "6"]
    assert main([*arguments, *end]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["answer"] == answers(made / "loud", "Capitals: oak")[0]
    data = ["--data", str(made / "data.jsonl"), "--rows", "2", "--metrics", "loss"]
    assert main(["evaluate", str(made / "hard"), "--task", "loud", *data, *end]) == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == 5
    assert main(["evaluate", str(made / "soft"), *data, "--device", "cpu", "--precision", "fp32"]) == 0
    assert "uniform" in capsys.readouterr().out


def test_a_router_is_the_same_each_time_and_says_what_it_lacks(made):
    model = rw.load_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "inferred").eval()
    before = model.rankwise_attachment.mixture.router_weight.clone()
    ids = rendered(made / "model")
    fit_router(model, ids, 259)
    assert torch.equal(model.rankwise_attachment.mixture.router_weight, before)
    with pytest.raises(RequestError, match="task 'quiet' has 1 rows"):
        fit_router(model, {"loud": ids["loud"], "quiet": ids["quiet"][:1]}, 259)
    with pytest.raises(RequestError, match="unknown task 'x'"):
        fit_router(model, {**ids, "x": ids["loud"]}, 259)
    with pytest.raises(RequestError, match="row 1 has no tokens"):
        inferred_tasks(model, [[]], 259)
    hard = rw.load_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "hard")
    with pytest.raises(RequestError, match="only a gate of mode 'inferred'"):
        fit_router(hard, ids, 259)
    assert read_gate_folder(made / "inferred").router["pooling"] == "mean"
