"""Combined folders against PEFT's `add_weighted_adapter` and dense float64 sums; what is refused; what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lora import model as lora_model
from safetensors.torch import load_file, save_file

from rankwise.attach.checkpoint import load_adapter
from rankwise.attach.inject import adapter_layers, disabled, ranks
from rankwise.errors import RequestError
from rankwise.recipes.combine import CombineConfig, combine
from rankwise.tasks.methods import METHODS
from tests import tiny
from tests.recipes.test_inspect import adapter

TWO = {"target_modules": ["q_proj", "v_proj"]}
PATTERNS = {**TWO, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
PAIRS = {
    "plain": (tiny.llama, TWO, TWO),
    "alphas": (tiny.llama, {**TWO, "lora_alpha": 3}, {**TWO, "lora_alpha": 16}),
    "rslora": (tiny.llama, {**TWO, "use_rslora": True}, {**TWO, "use_rslora": True}),
    "patterns": (tiny.llama, PATTERNS, PATTERNS),
    "gpt2": (tiny.gpt2, {}, {"lora_alpha": 2}),
    "embedding": (tiny.llama, *[{"target_modules": ["embed_tokens", "v_proj"]}] * 2),
    "convolution": (tiny.resnet, *[{"target_modules": ["convolution"]}] * 2),
    "ranks": (tiny.llama, {**TWO, "r": 2}, {**TWO, "r": 5, "use_rslora": True}),
    "layers": (tiny.llama, TWO, {"target_modules": ["v_proj", "up_proj"]}),
}
"""Two adapters of one model. Those before `ranks` have the same ranks everywhere, which PEFT wants for most methods."""
OF_ONE_RANK = list(PAIRS)[:7]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a pair, made once; whoever changes them copies them first."""
    made: dict[str, tuple[str, str]] = {}

    def folders(name: str) -> tuple[str, str]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            family, *both = PAIRS[name]
            torch.manual_seed(1)
            for folder, fields in zip("ab", both, strict=True):
                adapter(root / folder, family(), **fields)
            made[name] = str(root / "a"), str(root / "b")
        return made[name]

    return folders


def copied(folders, root: Path) -> tuple[str, ...]:
    return tuple(str(shutil.copytree(folder, root / Path(folder).name)) for folder in folders)


def deltas(folder: Path | str, model) -> dict[str, torch.Tensor]:
    """The dense update of each layer, in float64."""
    layers = adapter_layers(load_adapter(model, folder))
    return {name: layer.delta_weight().detach().double() for name, layer in layers.items()}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=3e-6 * float(theirs.abs().max()) + 1e-9)


def in_peft(a: str, b: str, family):
    model = peft.PeftModel.from_pretrained(family(), a, adapter_name="a")
    model.load_adapter(b, adapter_name="b")
    return model


def by_peft(model, weights, method: str, monkeypatch, seed: int = 7, **more) -> dict[str, torch.Tensor]:
    """The new adapter's B A: PEFT gives it the scale 1, but for rsLoRA, where it forgets the square root."""
    frozen = lora_model._freeze_adapter

    def freeze(*args):  # the last thing before it draws
        frozen(*args)
        torch.manual_seed(seed)

    with monkeypatch.context() as patched:
        patched.setattr(lora_model, "_freeze_adapter", freeze)
        model.add_weighted_adapter(["a", "b"], list(weights), method, combination_type=method, **more)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(method).detach().double() / layer.scaling[method]
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.layer.LoraLayer)
    }


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_equals_peft(name, weights, pair, tmp_path, monkeypatch):
    a, b = pair(name)
    theirs_model, ours_model = in_peft(a, b, PAIRS[name][0]), PAIRS[name][0]()
    for method, entry in METHODS.items():
        if method == "sum" or (name == "convolution" and (method == "svd" or "seed" in entry.takes)):
            continue  # PEFT has none; cuts the kernel off; draws in the order of the modules, ours of the names
        given = {"density": 0.4} if "density" in entry.takes else {}
        config = CombineConfig(**given, seed=7 if "seed" in entry.takes else None)
        combine([a, b], tmp_path / method, method, weights, config)
        theirs = by_peft(theirs_model, weights, method, monkeypatch, **given)
        ours = deltas(tmp_path / method, ours_model)
        assert ours.keys() == theirs.keys()
        for layer, change in ours.items():
            assert close(change, theirs[layer]), (method, layer)


@pytest.mark.parametrize("name", ["ranks", "layers"])
def test_equals_peft_for_other_ranks_and_layers(name, pair, tmp_path, monkeypatch):
    a, b = pair(name)
    theirs_model = in_peft(a, b, tiny.llama)
    for method in ("cat", "svd"):
        combine([a, b], tmp_path / method, method, [0.7, -0.4])
        theirs = by_peft(theirs_model, [0.7, -0.4], method, monkeypatch)
        ours = deltas(tmp_path / method, tiny.llama())
        assert ours.keys() == theirs.keys() and all(close(ours[layer], theirs[layer]) for layer in ours)


@pytest.mark.parametrize("method", ["sum", "cat"])
@pytest.mark.parametrize("name", PAIRS)
def test_sums_are_exact(name, method, pair, tmp_path):
    a, b = pair(name)
    found = combine([a, b, a], tmp_path / "out", method, [0.7, -0.4, 1.1])
    of_a, of_b, ours = (deltas(folder, PAIRS[name][0]()) for folder in (a, b, tmp_path / "out"))
    assert ours.keys() == of_a.keys() | of_b.keys() == {module["name"] for module in found["modules"]}
    for layer, change in ours.items():
        wanted = 1.8 * of_a.get(layer, torch.zeros(())) - 0.4 * of_b.get(layer, torch.zeros(()))
        assert float((change - wanted).norm()) <= 1e-6 * float(wanted.norm()), layer
    assert found["error"] < 1e-6 and all(module["error"] < 1e-6 for module in found["modules"])
    own = ranks(load_adapter(PAIRS[name][0](), tmp_path / "out"))
    for module in found["modules"]:
        first, second, third = module["ranks"]
        assert module["rank"] == own[module["name"]]
        assert module["rank"] == (first + second + third if method == "cat" else first + second)


@pytest.mark.parametrize("name", ["ranks", "layers", "embedding", "gpt2"])
def test_peft_loads_every_result_and_computes_the_same(name, pair, tmp_path):
    a, b = pair(name)
    model, ids = load_adapter(PAIRS[name][0](), a), tiny.token_ids()
    theirs = peft.PeftModel.from_pretrained(PAIRS[name][0](), a)
    for method in ("sum", "svd", "ties"):
        found = combine([a, b], tmp_path / method, method)
        load_adapter(model, tmp_path / method)
        theirs.load_adapter(str(tmp_path / method), adapter_name=method)
        theirs.set_adapter(method)
        with torch.no_grad():
            ours = model(ids).logits
            assert torch.allclose(ours, theirs(ids).logits, atol=1e-5), method
            with disabled(model):
                assert not torch.allclose(ours, model(ids).logits, atol=1e-3), method
        fields = json.loads((tmp_path / method / "adapter_config.json").read_text())
        assert fields["lora_alpha"] == fields["r"] == found["max_rank"] and fields["use_rslora"] is False
        assert fields["rank_pattern"] == fields["alpha_pattern"], "a reader that knows no patterns has the right scale"


def test_error_is_that_of_what_was_written(pair, tmp_path):
    a, b = pair("plain")
    of_a, of_b = deltas(a, tiny.llama()), deltas(b, tiny.llama())
    for method in METHODS:
        found = combine([a, b], tmp_path / method, method, [0.5, 0.5])
        ours = deltas(tmp_path / method, tiny.llama())
        lost = sum(float((ours[n] - (of_a[n] + of_b[n]) / 2).square().sum()) for n in ours)
        whole = sum(float(((of_a[n] + of_b[n]) / 2).square().sum()) for n in ours)
        assert found["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4, abs=2e-7), method
        assert found["weights"] == [0.5, 0.5]
        is_off = any("off the sum of the updates" in note for note in found["notes"])
        assert is_off is (method == "linear")


def test_half_precision_files_are_summed_in_fp32(pair, tmp_path):
    a, b = copied(pair("plain"), tmp_path)
    for folder, dtype in ((a, torch.bfloat16), (b, torch.float16)):
        file = Path(folder) / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert combine([a, b], tmp_path / "out")["error"] < 1e-6
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_default_weights_add_up_to_one_or_are_one(pair, tmp_path):
    a, b = pair("plain")
    for method, weights in (("sum", [0.25] * 4), ("dare_linear", [0.25] * 4), ("ties", [1.0] * 4)):
        assert combine([a, b, a, b], tmp_path / method, method)["weights"] == weights


def test_provenance_and_seed(pair, tmp_path):
    a, b = pair("plain")
    for out, seed in (("one", 3), ("same", 3), ("other", 4)):
        combine([a, b], tmp_path / out, "dare_ties", [1, 0.5], CombineConfig(density=0.3, seed=seed))
    files = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "same", "other")]
    assert files[0] == files[1] != files[2]
    record = json.loads((tmp_path / "one" / "provenance.json").read_text())
    made = record["combined"]
    assert (made["method"], made["density"], made["seed"], made["rank"]) == ("dare_ties", 0.3, 3, None)
    assert [source["weight"] for source in made["sources"]] == [1, 0.5]
    assert [Path(source["folder"]).name for source in made["sources"]] == ["a", "b"]
    assert all(len(source["files"]["adapter_model.safetensors"]) == 64 for source in made["sources"])
    assert record["versions"]["torch"] == torch.__version__


def test_a_combination_can_be_combined(pair, tmp_path):
    a, b = pair("ranks")
    combine([a, b], tmp_path / "ab", weights=[1, 1])
    combine([str(tmp_path / "ab"), b], tmp_path / "a2", weights=[1, -1])
    ours, wanted = deltas(tmp_path / "a2", tiny.llama()), deltas(a, tiny.llama())
    assert all(close(ours[layer], wanted[layer]) for layer in wanted)
    assert set(ranks(load_adapter(tiny.llama(), tmp_path / "a2")).values()) == {2}, "what was taken off is gone"


# --- what is not low-rank ------------------------------------------------------------------------------------------


def test_whole_modules_and_biases_are_averaged_by_shares(tmp_path, capsys):
    torch.manual_seed(0)
    for name in ("a", "b"):
        adapter(tmp_path / name, tiny.gpt2(), bias="lora_only", modules_to_save=["ln_f"])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    combine([a, b], tmp_path / "out", weights=[3, 1])
    assert "averaged by the shares of the weights" in capsys.readouterr().err
    first, second, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b", "out"))
    whole = [name for name in ours if "lora_" not in name]
    assert len(whole) > 2
    for name in whole:
        assert torch.allclose(ours[name], 0.75 * first[name] + 0.25 * second[name], atol=1e-6)
    load_adapter(tiny.gpt2(), tmp_path / "out")
    with pytest.raises(RequestError, match=r"averaged by the weights, which must be 0 or more .* not 1 -1"):
        combine([a, b], tmp_path / "no", weights=[1, -1])


def test_what_only_one_holds_is_taken_and_said(tmp_path, capsys):
    torch.manual_seed(0)
    adapter(tmp_path / "a", tiny.llama(), modules_to_save=["lm_head"])
    adapter(tmp_path / "b", tiny.llama())
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", "svd", [0.5, -0.5])
    assert "'lm_head.weight' is taken from" in capsys.readouterr().err
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "a"))
    name = "base_model.model.lm_head.weight"
    assert torch.equal(ours[name], theirs[name])
    assert peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "out") is not None


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "weights", "options", "message"),
    [
        ("sun", None, {}, "--method can't be 'sun'; did you mean 'sum'"),
        ("sum", [1], {}, r"--weights are 1 \(1\) for 2 adapters"),
        ("sum", [1, 2, 3], {}, r"--weights are 3 \(1 2 3\) for 2 adapters"),
        ("sum", [1, float("nan")], {}, "must be finite numbers, not nan"),
        ("sum", [0, 0], {}, "with the weights 0 0 the updates add up to nothing"),
        ("sum", None, {"rank": 4}, "--rank 4 has no effect on --method sum; leave it out, or use svd"),
        ("ties", None, {"energy": 0.5}, "--energy 0.5 has no effect on --method ties"),
        ("svd", None, {"density": 0.5}, "--density 0.5 has no effect on --method svd; .* use ties, dare_linear"),
        ("ties", None, {"seed": 1}, "--seed 1 has no effect on --method ties; leave it out, or use dare_linear"),
        ("svd", None, {"rank": 2, "energy": 0.5}, "give --rank or --energy, one of them"),
        ("svd", None, {"rank": 9}, "--rank 9 has no effect: the sum has a rank of 8 at most; .* use --method sum"),
        ("svd", None, {"rank": 0}, "--rank must be a whole number from 1, not 0"),
        ("svd", None, {"energy": 0.0}, "--energy must be above 0 and at most 1, not 0"),
        ("ties", None, {"density": 1.5}, "--density must be above 0 and at most 1, not 1.5"),
        ("ties", None, {"density": float("nan")}, "not nan"),
        ("ties", None, {"density": 0.001}, "density 0.001 leaves nothing"),
        ("sum", None, {"trials": 3}, "--trials 3 has no effect without --tune"),
    ],
)
def test_refused_requests_write_nothing(method, weights, options, message, pair, tmp_path):
    a, b = pair("plain")
    with pytest.raises(RequestError, match=message):
        combine([a, b], tmp_path / "out", method, weights, CombineConfig(**options))
    assert not list(tmp_path.iterdir())


def test_one_adapter_is_not_enough_and_twice_the_same_is(pair, tmp_path):
    a, _ = pair("plain")
    with pytest.raises(RequestError, match=r"two adapters or more, not 1; .* convert-rank"):
        combine([a], tmp_path / "out")
    combine([a, a], tmp_path / "out", weights=[2, -1])
    ours, wanted = deltas(tmp_path / "out", tiny.llama()), deltas(a, tiny.llama())
    assert all(close(ours[layer], wanted[layer]) for layer in wanted)


def test_folders_that_cannot_be_read_or_written(pair, tmp_path):
    a, b = pair("plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "tasks.json").write_text("{}")
    shutil.copytree(a, tmp_path / "torn")
    torn = tmp_path / "torn" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:200])
    cases = [
        ([a, b], "empty", "output folder .* exists"),
        ([a, b], "file/in", "can't be made"),
        ([a, str(tmp_path / "nope")], "out", "there is no run or adapter folder"),
        ([a, str(tmp_path / "empty")], "out", "is not an adapter"),
        ([a, str(tmp_path / "torn")], "out", "torn"),
        ([a, str(tmp_path / "gate")], "out", "holds several adapters under a gate: fold them into one by"),
    ]
    for names, out, message in cases:
        with pytest.raises(RequestError, match=message):
            combine(names, tmp_path / out)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_go_together(pair, tmp_path):
    a, _ = pair("plain")
    adapter(tmp_path / "dora", tiny.llama(), use_dora=True)
    adapter(tmp_path / "wide", tiny.llama(hidden_size=48))
    adapter(tmp_path / "bias", tiny.qwen(), bias="all")
    adapter(tmp_path / "other", tiny.llama(), base_model_name_or_path="some/base")
    adapter(tmp_path / "third", tiny.llama(), base_model_name_or_path="third/base")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "pissa")
    cases = {
        "dora": r"is a DoRA adapter: .* merge it",
        "wide": r"has other shapes in .* than in .*; combine adapters of one model",
        "bias": "has bias 'none' and .* 'all'",
        "pissa": "count from a base that was changed",
    }
    for name, message in cases.items():
        with pytest.raises(RequestError, match=message):
            combine([a, tmp_path / name], tmp_path / "out")
    with pytest.raises(RequestError, match=r"adapter of 'some/base' and .* of 'third/base'; .* --base"):
        combine([tmp_path / "other", tmp_path / "third"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine([tmp_path / "other", tmp_path / "third"], tmp_path / "out", config=CombineConfig(base="one/name"))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "one/name"


def test_bases_are_told_apart_by_their_hashes(pair, tmp_path):
    a, b = copied(pair("plain"), tmp_path)

    def trained_on(folder: str, digest: str) -> None:
        base = {"name": "x", "files": {"model.safetensors": {"bytes": 1, "sha256": digest}}}
        (Path(folder) / "provenance.json").write_text(json.dumps({"base": base}))

    trained_on(a, "1" * 64)
    trained_on(b, "2" * 64)
    with pytest.raises(RequestError, match=r"different bases: the hash of model.safetensors is 11111111 .* 22222222"):
        combine([a, b], tmp_path / "out", config=CombineConfig(base="one/name"))
    nothing_known = shutil.copytree(a, tmp_path / "bare")
    (nothing_known / "provenance.json").unlink()
    with pytest.raises(RequestError, match=r"b' are adapters of different bases"):
        combine([nothing_known, a, b], tmp_path / "out")
    trained_on(b, "1" * 64)
    combine([a, b], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["base"]["files"]["model.safetensors"]["sha256"] == "1" * 64


def test_a_configuration_that_disagrees_with_its_file(pair, tmp_path):
    a, b = copied(pair("plain"), tmp_path)
    file = Path(b) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 3}))
    with pytest.raises(RequestError, match=r"disagrees with its configuration: .* should have rank 3"):
        combine([a, b], tmp_path / "out")
