"""PEFT's folder: written and read to the last bit, swapped in place, and refused with the model as it was."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.low_rank import LowRankLayer
from rankwise.attach import attachment, checkpoint
from rankwise.attach.checkpoint import load_adapter, load_native_state, native_state, read_config, save_adapter
from rankwise.attach.inject import adapter_parameters, attach, detach, disabled, ranks
from rankwise.errors import RequestError, WorkError
from rankwise.ranks.dynamic import set_ranks
from tests import tiny
from tests.attach.attached_cases import EVERYTHING, IDS, attached, inputs_of
from tests.attach.folders import CONFIG, WEIGHTS, saved
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot

everything = pytest.mark.parametrize("what", EVERYTHING)


# --- there and back ------------------------------------------------------------------------------------------------


@everything
def test_save_load_save_is_byte_identical(what, tmp_path):
    model = attached(what)
    save_adapter(model, tmp_path / "first")
    again = load_adapter(EVERYTHING[what][0](), tmp_path / "first")
    assert relative(logits(again, **inputs_of(again)), logits(model, **inputs_of(model))) < 1e-6
    save_adapter(again, tmp_path / "second")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_alpha": 7.5},
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian", "base_model_name_or_path": "someone/base", "revision": "abc"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"trainable_token_indices": {"embed_tokens": [5, 3]}},
    ],
    ids=str,
)
def test_options_survive(options, tmp_path):
    saved(tmp_path / "first", **options)
    save_adapter(load_adapter(tiny.llama(), tmp_path / "first"), tmp_path / "second")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    config = read_config(tmp_path / "second")
    for name, value in options.items():
        if name not in {"target_modules", "init_lora_weights"}:
            assert getattr(config, name) == value


def test_a_folder_without_transformers(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.randn(3, 4)
    model = attach(build(), LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(build(), tmp_path)(x), model(x))
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert relative(theirs(x), model(x)) < 1e-6


def test_loaded_is_frozen_unless_it_is_to_be_trained(tmp_path):
    saved(tmp_path / "a", modules_to_save=["lm_head"])
    model = load_adapter(tiny.llama(), tmp_path / "a")
    assert not any(p.requires_grad for p in model.parameters())
    load_adapter(model, tmp_path / "a", trainable=True)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(model).values()}


def test_the_order_of_rank_patterns_survives_peft(tmp_path):
    """The first pattern that fits decides, PEFT and we write sorted keys: the file must say it in another way."""
    for options in (
        {"rank_pattern": {"q_proj": 6, r"model\.layers\.0\.self_attn\.q_proj": 2}},
        {"alpha_pattern": {"q_proj": 6, r"model\.layers\.0\.self_attn\.q_proj": 2}},
    ):
        shutil.rmtree(tmp_path / "mine", ignore_errors=True)
        mine = attach(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
        randomise(mine)
        save_adapter(mine, tmp_path / "mine")
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "mine").eval()
        for name, rank in ranks(mine).items():
            assert theirs.base_model.model.get_submodule(name).r["default"] == rank
        assert relative(logits(theirs, input_ids=IDS), logits(mine, input_ids=IDS)) < 1e-6
        assert ranks(load_adapter(tiny.llama(), tmp_path / "mine")) == ranks(mine)


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.z = nn.Linear(4, 4), nn.ModuleDict({"q": nn.Linear(4, 4)})

        def forward(self, x):
            return self.z["q"](self.q(x))

    torch.manual_seed(1)
    plain = Twice()
    mine = attach(Twice(), LoraConfig(r=1, target_modules=["q"], rank_pattern={"z.q": 3, "q": 2}))
    mine.load_state_dict({n.replace("q.", "q.base.", 1): t for n, t in plain.state_dict().items()}, strict=False)
    assert ranks(mine) == {"q": 2, "z.q": 3}
    save_adapter(mine, tmp_path)
    assert ranks(load_adapter(plain, tmp_path)) == {"q": 2, "z.q": 3}


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [2, 7])
def test_resized_layers_are_saved_with_the_ranks_they_have(start, use_rslora, rank, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start, use_rslora=use_rslora)
    model = attach(tiny.llama(), config)
    randomise(model)
    set_ranks(model, {"model.layers.0.self_attn.q_proj": rank})
    save_adapter(model, tmp_path)
    expected = logits(model, input_ids=IDS)
    assert relative(logits(load_adapter(tiny.llama(), tmp_path), input_ids=IDS), expected) < 1e-5
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert relative(logits(theirs, input_ids=IDS), expected) < 1e-5


# --- swapping ------------------------------------------------------------------------------------------------------


def test_the_same_layout_is_swapped_in_place(tmp_path):
    saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)
    model = load_adapter(tiny.llama(), tmp_path / "a")
    parts = {name: id(p) for name, p in model.named_parameters()}
    first = logits(model, input_ids=IDS)
    load_adapter(model, tmp_path / "b")
    assert {name: id(p) for name, p in model.named_parameters()} == parts
    fresh = load_adapter(tiny.llama(), tmp_path / "b")
    assert torch.equal(logits(model, input_ids=IDS), logits(fresh, input_ids=IDS))
    load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model, input_ids=IDS), first)


def test_nothing_is_initialised_before_it_is_loaded_and_names_are_looked_up_once(tmp_path, monkeypatch):
    saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)

    def start(self, *arguments):
        raise AssertionError("initialised")

    monkeypatch.setattr(LowRankLayer, "start_", start)
    with pytest.raises(AssertionError, match="initialised"):
        attach(tiny.llama(), LoraConfig())
    model = load_adapter(tiny.llama(), tmp_path / "a")
    walks = []
    walk = attachment.adapter_layers
    monkeypatch.setattr(attachment, "adapter_layers", lambda model: walks.append(model) or walk(model))
    load_adapter(model, tmp_path / "b")
    first = len(walks)
    load_adapter(model, tmp_path / "a")
    assert first <= 1 and len(walks) == first


OTHERS = {
    "rank": {"r": 2}, "alpha": {"lora_alpha": 5}, "rslora": {"use_rslora": True},
    "targets": {"target_modules": ["k_proj"]},
    "dora": {"use_dora": True}, "whole": {"modules_to_save": ["lm_head"]}, "rows": {"trainable_token_indices": [3]},
    "pattern": {"rank_pattern": {"q_proj": 2}}, "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_another_layout_replaces(other, back, tmp_path):
    saved(tmp_path / "plain", seed=1), saved(tmp_path / "other", seed=2, **OTHERS[other])
    first, second = ("other", "plain") if back else ("plain", "other")
    model = load_adapter(tiny.llama(), tmp_path / first)
    load_adapter(model, tmp_path / second)
    fresh = load_adapter(tiny.llama(), tmp_path / second)
    assert torch.equal(logits(model, input_ids=IDS), logits(fresh, input_ids=IDS))
    assert ranks(model) == ranks(fresh)
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / second / WEIGHTS).read_bytes()
    detach(model)
    assert torch.equal(logits(model, input_ids=IDS), logits(tiny.llama(), input_ids=IDS))


def test_a_grown_adapter_is_replaced_by_its_former_self(tmp_path):
    saved(tmp_path / "a")
    model = load_adapter(tiny.llama(), tmp_path / "a")
    expected = logits(model, input_ids=IDS)
    model.get_submodule("model.layers.0.self_attn.q_proj").resize_(9)
    load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model, input_ids=IDS), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_unconverted_start_is_not_copied_into_plain_layers(start, tmp_path):
    """Same names, ranks and shapes, but the folder's factors mean something else."""
    options = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(**options, init_lora_weights=start)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = attach(tiny.llama(), LoraConfig(**options))
    assert relative(logits(load_adapter(model, tmp_path), input_ids=IDS), logits(theirs, input_ids=IDS)) < 1e-5


def test_loading_inside_disabled_is_refused(tmp_path):
    saved(tmp_path / "a")
    model = load_adapter(tiny.llama(), tmp_path / "a")
    expected = logits(model, input_ids=IDS)
    with disabled(model), pytest.raises(RequestError, match="can't load an adapter inside `disabled`; leave the block"):
        load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model, input_ids=IDS), expected)


# --- writing fails -------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = attach(tiny.llama(), LoraConfig(r=2))
    with torch.no_grad():
        adapter_parameters(model)["model.layers.1.mlp.up_proj.lora_B"][0, 0] = float("nan")
    with pytest.raises(WorkError, match=r"up_proj.lora_B.weight' holds values that are not finite; .* not saved"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_other_files_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path, seed=1)
    saved(tmp_path, seed=2)
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", CONFIG, WEIGHTS}
    assert (tmp_path / "README.md").read_text() == "mine"
    mode = stat.S_IMODE((tmp_path / WEIGHTS).stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "README.md").stat().st_mode)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("which", ["write_bytes", "write_text"])
def test_a_full_disk_leaves_what_was_there(existing, which, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    if existing:
        saved(folder, seed=1)
    before = {file.name: file.read_bytes() for file in folder.iterdir()} if existing else None

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, which, full)
    with pytest.raises(WorkError, match=r"cannot write '.*adapter.*': No space left on device; free space or choose"):
        saved(folder, seed=2)
    monkeypatch.undo()
    if existing:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(WorkError, match=r"cannot write '.*adapter/adapter_model.safetensors'"):
        saved(tmp_path / "adapter")
    with pytest.raises(WorkError, match=r"cannot write '.*adapter/below'"):
        saved(tmp_path / "adapter" / "below")
    assert (tmp_path / "adapter").read_text() == "a file"


# --- native state --------------------------------------------------------------------------------------------------


@everything
def test_native_state_there_and_back(what):
    model, twin = attached(what), attached(what)
    randomise(twin, seed=5)
    state = {name: tensor.clone() for name, tensor in native_state(model).items()}
    load_native_state(twin, state)
    assert torch.equal(logits(twin, **inputs_of(twin)), logits(model, **inputs_of(model)))
    with disabled(model):
        inside = native_state(model)
    assert inside.keys() == state.keys() and all(torch.equal(inside[name], state[name]) for name in state)


def test_native_state_is_strict():
    model = attach(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    before = snapshot(model)
    other = native_state(attach(tiny.llama(), LoraConfig(r=4, target_modules=["k_proj"])))
    with pytest.raises(RequestError, match=r"the saved state lacks model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        load_native_state(model, other)
    other = native_state(attach(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(RequestError, match=r"saved state disagrees .*lora_A \[2, 32\] where the model has \[4, 32\]"):
        load_native_state(model, other)
    assert_unchanged(model, before)


def test_nothing_attached_is_nothing_to_save(tmp_path):
    for action in (lambda m: save_adapter(m, tmp_path / "a"), native_state, checkpoint.peft_config):
        with pytest.raises(RequestError, match="no adapter is attached"):
            action(tiny.llama())
