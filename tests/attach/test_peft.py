"""Against the published wheel of PEFT, both directions: same files, same outputs, same merged weights."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankwise.adapters.config import LoraConfig
from rankwise.attach import checkpoint
from rankwise.attach.inject import attach, disabled, merge_in, ranks
from tests.attach.peft_cases import CASES, Case, randomise

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = 1e-6


def output(model, case: Case) -> torch.Tensor:
    with torch.no_grad():
        out = model(**case.inputs())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, bound: float = FP32) -> None:
    error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
    assert error <= bound, f"relative difference {error:.2e}"


def is_tied(model) -> bool:
    return getattr(model.config.get_text_config(), "tie_word_embeddings", False)


def tied_names(model) -> set[str]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n for n, p in parameters.items() if sum(p is other for other in parameters.values()) > 1}


def ours(case: Case):
    options = {"r": 4, "lora_alpha": 8, **case.options}
    return attach(case.model(), LoraConfig(**options))


def theirs(case: Case) -> peft.PeftModel:
    options = {"r": 4, "lora_alpha": 8, **case.options}
    model = peft.get_peft_model(case.model(), peft.LoraConfig(**options))
    return model.eval()


@pytest.fixture(params=CASES, ids=lambda case: f"{case.kind}-{case.name}")
def case(request) -> Case:
    return request.param


def test_peft_reads_ours(case: Case, tmp_path):
    mine = ours(case)
    randomise(mine)
    checkpoint.save_adapter(mine, tmp_path / "mine")
    read = peft.PeftModel.from_pretrained(case.model(), tmp_path / "mine").eval()
    assert_close(output(read, case), output(mine, case))
    with disabled(mine):
        assert torch.equal(output(mine, case), output(case.model(), case))
    assert not torch.equal(output(mine, case), output(case.model(), case)), "the adapter does nothing"
    unmerged = output(mine, case)
    theirs_merged, mine_merged = read.merge_and_unload(), merge_in(mine)
    assert_close(output(mine_merged, case), unmerged, bound=1e-5)
    untied = is_tied(case.model()) and not is_tied(mine_merged)
    state = mine_merged.state_dict()
    for name, tensor in theirs_merged.state_dict().items():
        if not (untied and name in tied_names(case.model())):  # PEFT changes all tied weights along with one
            assert_close(state[name], tensor)


def test_we_read_peft(case: Case, tmp_path):
    other = theirs(case)
    randomise(other)
    other.save_pretrained(tmp_path / "theirs")
    mine = checkpoint.load_adapter(case.model(), tmp_path / "theirs")
    assert_close(output(mine, case), output(other, case))
    checkpoint.save_adapter(mine, tmp_path / "again")
    written, original = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "theirs"))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype
    if not any(name.startswith("loaded") for name in written):
        assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
            tmp_path / "theirs/adapter_model.safetensors"
        ).read_bytes()


def test_same_folder(case: Case, tmp_path):
    """Keys, dtypes and every field of the configuration; all-linear may be spelled by suffix, which means the same."""
    mine, other = ours(case), theirs(case)
    checkpoint.save_adapter(mine, tmp_path / "mine")
    other.save_pretrained(tmp_path / "theirs")
    tensors, expected = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("mine", "theirs"))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    configs = [tmp_path / folder / "adapter_config.json" for folder in ("mine", "theirs")]
    fields, expected_fields = (json.loads(config.read_text()) for config in configs)
    for each in (fields, expected_fields):
        if isinstance(each["target_modules"], list):
            each["target_modules"] = sorted(each["target_modules"])
        each["target_parameters"] = each["target_parameters"] or None  # PEFT writes [] for mixture-of-experts models
    if case.options["target_modules"] == "all-linear":
        again = peft.get_peft_model(case.model(), peft.PeftConfig.from_pretrained(tmp_path / "mine"))
        assert again.targeted_module_names == other.targeted_module_names
        fields["target_modules"] = expected_fields["target_modules"]
    assert fields == expected_fields
    peft_ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in other.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ranks(mine) == peft_ranks


def test_there_are_cases_of_every_kind():
    kinds = {case.kind for case in CASES}
    assert kinds == {
        "family", "layer", "target", "pattern", "scale", "bias", "dora", "start", "modules_to_save", "tokens"
    }  # fmt: skip
    assert len({case.name for case in CASES}) == len(CASES)
