"""A vocabulary that changed before attaching: saved with the adapter as PEFT does, and read into the plain base."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import load_adapter, save_adapter
from rankwise.attach.inject import adapter_parameters, attach, detach, disabled, merge_in
from rankwise.errors import RequestError
from tests import tiny
from tests.attach.folders import CONFIG, WEIGHTS, edit_weights
from tests.attach.peft_cases import randomise
from tests.attach.snapshots import assert_unchanged, logits, relative, snapshot

OLD, NEW = tiny.VOCABULARY, tiny.VOCABULARY + 4
IDS = torch.tensor([[OLD, 5, OLD + 3, 9, OLD + 1, 7]])
OLD_IDS = tiny.token_ids()

CASES: dict[str, dict] = {
    "plain": {},
    "head-target": {"target_modules": ["q_proj", "lm_head"]},
    "embedding-target": {"target_modules": ["q_proj", "embed_tokens"]},
    "both-targets": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [OLD, OLD + 1, OLD + 2, OLD + 3]},
    "dora": {"use_dora": True},
}
BUILDS = {"untied": tiny.llama, "tied": lambda: tiny.llama(tied=True), "gemma3": tiny.gemma3}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=BUILDS)
def base(request, tmp_path) -> Path:
    BUILDS[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> PreTrainedModel:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def resized(base: Path, seed: int = 3, rows: int = NEW) -> PreTrainedModel:
    """Resized by hand; the new rows are random, and the same for the same seed."""
    model = load(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def options_of(case: str) -> dict:
    return {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **CASES[case]}


def lost_by_peft(case: str, base: Path) -> bool:
    """PEFT leaves out an embedding whose new rows matter when only the other one is a target."""
    tied = load(base).config.tie_word_embeddings
    return not tied and case in {"head-target", "embedding-target"}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_ours(case, base, tmp_path):
    mine = attach(resized(base), LoraConfig(**options_of(case)))
    randomise(mine)
    save_adapter(mine, tmp_path / "mine")
    expected = logits(mine, input_ids=IDS)
    theirs = peft.PeftModel.from_pretrained(resized(base, seed=4), tmp_path / "mine").eval()
    assert relative(logits(theirs, input_ids=IDS), expected) < 1e-6
    for plain in (load(base), resized(base, seed=4)):  # resized by us, and by hand
        again = load_adapter(plain, tmp_path / "mine")
        assert again.config.get_text_config().vocab_size == NEW
        assert relative(logits(again, input_ids=IDS), expected) < 1e-6
        save_adapter(again, tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "mine" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_we_read_peft(case, base, tmp_path):
    theirs = peft.get_peft_model(resized(base), peft.LoraConfig(**options_of(case))).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, input_ids=IDS)
    if lost_by_peft(case, base):
        plain = load(base)
        before = snapshot(plain)
        with pytest.raises(RequestError, match="resize it as it was when the adapter was trained, then load"):
            load_adapter(plain, tmp_path / "theirs")
        assert_unchanged(plain, before)
    else:
        assert relative(logits(load_adapter(load(base), tmp_path / "theirs"), input_ids=IDS), expected) < 1e-6
    by_hand = load_adapter(resized(base), tmp_path / "theirs")
    assert relative(logits(by_hand, input_ids=IDS), expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_keys_are_those_of_peft(case, base, tmp_path):
    """But for two quirks: PEFT writes heads trained whole three times over, and loses the embedding beside a target."""
    save_adapter(attach(resized(base), LoraConfig(**options_of(case))), tmp_path / "mine")
    peft.get_peft_model(resized(base), peft.LoraConfig(**options_of(case))).save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("mine", "theirs"))
    copies = {name for name in theirs if ".original_module." in name or ".modules_to_save." in name}
    assert bool(copies) == case.startswith("whole")
    assert theirs.keys() - copies <= mine.keys()
    assert all(mine[name].shape == theirs[name].shape for name in theirs.keys() - copies)
    beside = mine.keys() - theirs.keys()
    if case in {"head-target", "embedding-target"}:
        other = "model.embed_tokens" if case == "head-target" else "lm_head"
        assert beside == {f"base_model.model.{other}.weight"}
    else:
        assert not beside


@pytest.mark.parametrize("case", CASES)
def test_the_base_keeps_its_own_rows(case, base, tmp_path):
    model = resized(base)
    with torch.no_grad():  # someone changed old rows as well
        model.get_input_embeddings().weight[:5] += 1.0
    attach(model, LoraConfig(**options_of(case)))
    randomise(model)
    save_adapter(model, tmp_path / "mine")
    again = load_adapter(load(base), tmp_path / "mine")
    assert relative(logits(again, input_ids=IDS), logits(model, input_ids=IDS)) < 1e-6
    with disabled(again):
        assert torch.equal(logits(again, input_ids=OLD_IDS)[..., :OLD], logits(load(base), input_ids=OLD_IDS))
    detach(again)
    assert torch.equal(logits(again, input_ids=OLD_IDS), logits(load(base), input_ids=OLD_IDS))


def test_only_the_adapter_learns_after_loading(base, tmp_path):
    model = attach(resized(base), LoraConfig(**options_of("plain")))
    save_adapter(model, tmp_path / "mine")
    again = load_adapter(load(base), tmp_path / "mine", trainable=True)
    assert all(".lora_" in name for name in adapter_parameters(again))
    assert {id(p) for p in again.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(again).values()}


@pytest.mark.parametrize("case", CASES)
def test_merged_and_reloaded(case, base, tmp_path):
    model = attach(resized(base), LoraConfig(**options_of(case)))
    randomise(model)
    save_adapter(model, tmp_path / "mine")
    again = load_adapter(load(base), tmp_path / "mine")
    expected = logits(again, input_ids=IDS)
    merge_in(again).save_pretrained(tmp_path / "merged")
    assert relative(logits(load(tmp_path / "merged"), input_ids=IDS), expected) < 1e-5


def test_a_smaller_vocabulary(base, tmp_path):
    model = attach(resized(base, rows=OLD - 10), LoraConfig(**options_of("plain")))
    randomise(model)
    save_adapter(model, tmp_path / "mine")
    again = load_adapter(load(base), tmp_path / "mine")
    assert again.get_input_embeddings().num_embeddings == OLD - 10
    ids = OLD_IDS.clamp(max=OLD - 11)
    assert relative(logits(again, input_ids=ids), logits(model, input_ids=ids)) < 1e-6


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [NEW, OLD - 10], ids=["larger", "smaller"])
def test_detaching_gives_the_vocabulary_back(case, rows, base, tmp_path):
    options = options_of(case)
    if case == "rows":
        options["trainable_token_indices"] = [0, rows - 1]
    model = attach(resized(base, rows=rows), LoraConfig(**options))
    randomise(model)
    save_adapter(model, tmp_path / "mine")
    plain = load(base)
    next(plain.parameters()).requires_grad_(False)
    before, config = values(plain), plain.config.to_dict()
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    for _ in range(2):
        again = detach(load_adapter(plain, tmp_path / "mine"))
        assert again.get_input_embeddings().num_embeddings == OLD and again.config.to_dict() == config
        after = values(again)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
        assert torch.equal(logits(again, input_ids=OLD_IDS), logits(load(base), input_ids=OLD_IDS))


def test_what_was_cut_off_moves_and_is_copied_with_the_model(base, tmp_path):
    model = attach(resized(base, rows=OLD - 10), LoraConfig(**options_of("plain")))
    save_adapter(model, tmp_path / "mine")
    again = load_adapter(load(base), tmp_path / "mine").double()
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again)), again):
        detach(twin)
        assert all(torch.equal(p, q.double()) for p, q in zip(twin.parameters(), load(base).parameters(), strict=True))


def test_swapping_between_vocabularies(base, tmp_path):
    new = attach(resized(base), LoraConfig(**options_of("plain")))
    old = attach(load(base), LoraConfig(**options_of("plain")))
    randomise(new, seed=1), randomise(old, seed=2)
    save_adapter(new, tmp_path / "new"), save_adapter(old, tmp_path / "old")
    model = load_adapter(load(base), tmp_path / "old")
    load_adapter(model, tmp_path / "new")
    assert relative(logits(model, input_ids=IDS), logits(new, input_ids=IDS)) < 1e-6
    load_adapter(model, tmp_path / "old")
    got = logits(model, input_ids=OLD_IDS)
    assert relative(got, logits(old, input_ids=OLD_IDS)) < 1e-6


def _different(tensors):
    name = next(n for n in tensors if n.endswith("lm_head.weight"))
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), "lacks model.layers"),
        (lambda t: t.update({"base_model.model.model.strange": torch.zeros(1)}), "holds model.strange"),
        (_different, "holds embeddings of different sizes"),
    ],
    ids=["missing", "strange", "sizes"],
)
def test_a_failure_after_resizing_puts_everything_back(change, message, attached, base, tmp_path):
    save_adapter(attach(resized(base), LoraConfig(**options_of("plain"))), tmp_path / "broken")
    edit_weights(tmp_path / "broken", change)
    model = load(base)
    if attached:
        attach(model, LoraConfig(r=2, target_modules=["embed_tokens", "k_proj"], modules_to_save=["lm_head"]))
    before = snapshot(model)
    with pytest.raises(RequestError) as caught:
        load_adapter(model, tmp_path / "broken")
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_t5_is_put_back_too(tmp_path):
    """transformers resizes T5 by exchanging its encoder's and decoder's embeddings."""
    tiny.t5().save_pretrained(tmp_path / "base")
    cls = type(tiny.t5())
    model = cls.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(NEW, mean_resizing=False)
    attach(model, LoraConfig(r=2, target_modules=["q"]))
    randomise(model)
    save_adapter(model, tmp_path / "mine")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    again = load_adapter(cls.from_pretrained(tmp_path / "base").eval(), tmp_path / "mine")
    assert relative(logits(again, **inputs), logits(model, **inputs)) < 1e-6
    expected = values(cls.from_pretrained(tmp_path / "base"))
    after = values(detach(again))
    assert after.keys() == expected.keys() and all(torch.equal(after[name], expected[name]) for name in expected)
    edit_weights(tmp_path / "mine", lambda t: t.pop(next(n for n in t if "lora_B" in n)))
    plain = cls.from_pretrained(tmp_path / "base").eval()
    before = snapshot(plain)
    with pytest.raises(RequestError, match="lacks"):
        load_adapter(plain, tmp_path / "mine")
    assert_unchanged(plain, before)


def test_an_unknown_base_is_taken_to_be_unchanged(base, tmp_path):
    """As PEFT: nothing to compare with."""
    model = resized(base)
    shutil.rmtree(base)
    attach(model, LoraConfig(**options_of("plain")))
    save_adapter(model, tmp_path / "mine")
    assert all(".lora_" in name for name in load_file(tmp_path / "mine" / WEIGHTS))


def test_embeddings_saved_though_nothing_changed(base, tmp_path):
    """PEFT's `save_embedding_layers=True`: read, and written again."""
    theirs = peft.get_peft_model(load(base), peft.LoraConfig(**options_of("plain"))).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    mine = load_adapter(load(base), tmp_path / "theirs")
    assert relative(logits(mine, input_ids=OLD_IDS), logits(theirs, input_ids=OLD_IDS)) < 1e-6
    save_adapter(mine, tmp_path / "mine")
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert (tmp_path / "mine" / CONFIG).exists()
