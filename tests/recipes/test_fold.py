"""A folded gate against the gate itself, in our model and in PEFT's; what can't be folded is said."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

import rankwise as rw
from rankwise.adapters.gate_config import EmbeddingConfig, GateConfig
from rankwise.attach.checkpoint import read_config, read_tensors
from rankwise.attach.targets import alpha_in, rank_in
from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.recipes.fold import fold
from tests import tiny
from tests.attach.gate_cases import TASKS, disturbed, saved_adapters
from tests.test_docs import check_fields

GATES = {
    "soft": GateConfig("soft", temperature=0.7),
    "soft-layer": GateConfig("soft", per="layer"),
    "soft-module": GateConfig("soft", per="module"),
    "top-k": GateConfig("top-k", k=2),
    "hard": GateConfig(),
}
IDS = tiny.token_ids()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(a, b, to=1e-5):
    return float((a - b).abs().max()) <= to * float(b.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


def saved_gate(folder, folders, gate, build=tiny.llama, **more):
    model = disturbed(rw.attach_gate(build(), folders, gate, **more), 7)
    rw.save_adapter(model, folder)
    return model


@pytest.mark.parametrize("what", GATES)
def test_folded_is_unfolded(what, folders, tmp_path):
    model = saved_gate(tmp_path / "gate", folders, GATES[what])
    for task in (None, *TASKS) if what != "hard" else TASKS:
        out = tmp_path / f"folded-{task}"
        document = fold(str(tmp_path / "gate"), out, task=task)
        assert document["error"] == 0.0 and document["task"] == task
        if task is None:
            expected = logits(model)
        else:
            with rw.on_task(model, task):
                expected = logits(model)
        assert close(logits(rw.load_adapter(tiny.llama(), out)), expected)
    if what.startswith("soft"):
        ranks = rw.ranks(rw.load_adapter(tiny.llama(), tmp_path / "folded-None"))
        assert ranks["model.layers.0.self_attn.q_proj"] == 4 + 1 + 6, "the rank is the sum of the adapters'"
    if what == "top-k":
        ranks = rw.ranks(rw.load_adapter(tiny.llama(), tmp_path / "folded-None"))
        assert ranks["model.layers.0.self_attn.q_proj"] < 4 + 1 + 6, "those without a share are left out"


@pytest.mark.parametrize("cut", [{}, dict(rank=3)])
def test_all_layers_have_scale_1(cut, folders, tmp_path):
    """So that a reader that knows no patterns, or rsLoRA, scales rightly."""
    saved_gate(tmp_path / "gate", folders, GateConfig("soft"))
    document = fold(str(tmp_path / "gate"), tmp_path / "folded", **cut)
    fields = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    assert fields["lora_alpha"] == fields["r"] == document["max_rank"] and fields["use_rslora"] is False
    assert fields["rank_pattern"] == fields["alpha_pattern"] and bool(fields["rank_pattern"]) is not bool(cut)
    config, tensors = read_config(tmp_path / "folded"), read_tensors(tmp_path / "folded")
    for module in document["modules"]:
        name = module["name"]
        assert (
            module["rank"] == rank_in(config, name) == alpha_in(config, name) == len(tensors[f"{name}.lora_A.weight"])
        )


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_peft_loads_the_folded_and_each_single_adapter(build, tmp_path):
    folders = saved_adapters(tmp_path, build)
    model = saved_gate(tmp_path / "gate", folders, GateConfig("soft", per="layer"), build)
    fold(str(tmp_path / "gate"), tmp_path / "folded")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "folded")
    assert close(logits(theirs), logits(model))
    for task in TASKS:
        single = PeftModel.from_pretrained(build(), tmp_path / "gate" / task)
        with rw.on_task(model, task):
            assert close(logits(single), logits(model))


@pytest.mark.parametrize("per", ["layer", "shared"])
def test_embeddings_fold_per_task(per, tmp_path):
    config = rw.LoraConfig(r=4, lora_alpha=12)
    model = disturbed(rw.attach_embedding(tiny.llama(), config, ["a", "b"], EmbeddingConfig(per)), 2)
    rw.save_adapter(model, tmp_path / "gate")
    for task in ("a", "b"):
        fold(str(tmp_path / "gate"), tmp_path / task, task=task)
        with rw.on_task(model, task):
            assert close(logits(rw.load_adapter(tiny.llama(), tmp_path / task)), logits(model))
    with pytest.raises(RequestError, match="one adapter for each task"):
        fold(str(tmp_path / "gate"), tmp_path / "none")


def test_a_shared_adapter_is_folded_in(folders, tmp_path):
    shared = rw.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj", "q_proj"])
    model = saved_gate(tmp_path / "gate", folders, GateConfig(), shared=shared)
    fold(str(tmp_path / "gate"), tmp_path / "books", task="books")
    with rw.on_task(model, "books"):
        assert close(logits(rw.load_adapter(tiny.llama(), tmp_path / "books")), logits(model))


def test_shares_by_hand_are_the_mixture(folders, tmp_path):
    model = saved_gate(tmp_path / "gate", folders, GateConfig())
    shares = dict.fromkeys(TASKS, 1 / 3)
    fold(str(tmp_path / "gate"), tmp_path / "uniform", task=shares)
    with rw.on_task(model, shares):
        assert close(logits(rw.load_adapter(tiny.llama(), tmp_path / "uniform")), logits(model))


@pytest.mark.parametrize("cut", [dict(rank=3), dict(energy=0.9)])
def test_a_lower_rank_is_the_best_approximation_with_its_error(cut, folders, tmp_path):
    model = saved_gate(tmp_path / "gate", folders, GateConfig("soft"))
    document = fold(str(tmp_path / "gate"), tmp_path / "folded", **cut)
    assert 0 < document["error"] < 1
    folded = rw.load_adapter(tiny.llama(), tmp_path / "folded")
    lost = whole = 0.0
    layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "GateLayer"}
    for module in document["modules"]:
        change = layers[module["name"]].delta_weight().detach().double()
        mine = folded.get_submodule(module["name"]).delta_weight().detach().double()
        values = torch.linalg.svdvals(change)
        kept = module["rank"]
        best = float(values[kept:].norm() / values.norm())
        assert float((mine - change).norm() / change.norm()) == pytest.approx(best, abs=1e-5)
        assert module["error"] == pytest.approx(best, abs=1e-5)
        lost, whole = lost + float(values[kept:].square().sum()), whole + float(values.square().sum())
    assert document["error"] == pytest.approx((lost / whole) ** 0.5, abs=1e-5)


def test_what_can_t_be_folded(folders, tmp_path):
    saved_gate(tmp_path / "gate", folders, GateConfig("inferred"))
    target = str(tmp_path / "gate")
    with pytest.raises(
        RequestError, match="infers the task from its input, so it is no one adapter: fold each task by"
    ):
        fold(target, tmp_path / "x")
    with pytest.raises(RequestError, match="unknown task 'moovies'; did you mean 'movies'"):
        fold(target, tmp_path / "x", task="moovies")
    with pytest.raises(RequestError, match="not both"):
        fold(target, tmp_path / "x", task="movies", rank=1, energy=0.5)
    with pytest.raises(RequestError, match="--rank 64 has no effect"):
        fold(target, tmp_path / "x", task="movies", rank=64)
    with pytest.raises(RequestError, match="exists"):
        fold(target, target, task="movies")
    with pytest.raises(RequestError, match="is no gate"):
        fold(folders["movies"], tmp_path / "x", task="movies")
    with pytest.raises(RequestError, match="there is no folder"):
        fold(str(tmp_path / "nowhere"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_model_in_the_folder_is_refused(folders, tmp_path):
    saved_gate(tmp_path / "gate", folders, GateConfig("soft"))
    wide = rw.attach(tiny.llama(hidden_size=64), rw.LoraConfig(r=2, target_modules=["q_proj"]))
    rw.save_adapter(wide, tmp_path / "gate" / "books")
    with pytest.raises(
        RequestError, match=r"q_proj' has other shapes in adapter 'movies' than in 'books' .*\[64\] inputs"
    ):
        fold(str(tmp_path / "gate"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(folders, tmp_path, capsys):
    saved_gate(tmp_path / "gate", folders, GateConfig())
    arguments = ["fold", str(tmp_path / "gate"), "--task", "movies", "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    check_fields("fold", document)
    check_fields("fold", document["modules"][0])
    assert document["output"] == str(tmp_path / "out") and document["error"] == 0.0 and document["max_rank"] == 4
    assert main(["fold", str(tmp_path / "gate"), "--out", str(tmp_path / "other")]) == 2
    assert "choose one by --task (of movies, books, games)" in capsys.readouterr().err
    assert main(["fold", str(tmp_path / "gate"), "--task", "books", "--out", str(tmp_path / "third")]) == 0
    assert "task books" in capsys.readouterr().out


def test_a_folded_task_is_the_adapter_it_came_from(folders, tmp_path):
    saved_gate(tmp_path / "gate", folders, GateConfig())
    for task in TASKS:
        before, after = read_config(folders[task]), read_config(tmp_path / "gate" / task)
        assert before.with_(init_lora_weights=True) == after
        assert read_tensors(folders[task]).keys() == read_tensors(tmp_path / "gate" / task).keys()
