"""Runs of classifiers and embeddings, from rows to the adapter's folder: exact, and readable by others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import rankwise as rw
from rankwise.attach.inject import adapter_parameters
from rankwise.errors import RequestError
from rankwise.models.config import ModelConfig
from rankwise.models.labels import Labels
from rankwise.models.load import load_model, new_modules
from rankwise.recipes.finetune import train
from tests import tiny
from tests.recipes.runs import adapter_bytes, metrics, unmeasured
from tests.train.labelled import KINDS, OBJECTIVE, rows, write

AUTO_CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "embedding": transformers.AutoModel,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny encoders, with dropout and without, and rows of each kind."""
    folder = tmp_path_factory.mktemp("heads")
    for name, dropout in (("model", 0.1), ("still", 0.0)):
        tiny.encoder(dropout).save_pretrained(folder / name)
        tiny.word_tokenizer().save_pretrained(folder / name)
    for kind in KINDS:
        write(folder / f"{kind}.jsonl", rows(kind, 26))
        write(folder / f"{kind}-valid.jsonl", rows(kind, 7, seed=1))
    return folder


def settings(files: Path, kind: str, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    run: dict[str, Any] = {
        "model": {"name": str(files / "model"), "device": "cpu"},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"train": str(files / f"{kind}.jsonl"), "valid": str(files / f"{kind}-valid.jsonl")},
        "train": {
            "objective": OBJECTIVE[kind], "steps": 6, "batch_size": 8, "micro_batch_size": 3, "lr": 1e-2,
            "max_grad_norm": 0.3, "precision": "fp32", "save_every": 1, "keep_checkpoints": None, "evaluate_every": 2,
        },
        "output": str(output),
    }  # fmt: skip
    return {**run, **{name: {**run.get(name, {}), **values} for name, values in sections.items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_any_step_is_the_straight_run(files: Path, kind: str, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    train(settings(files, kind, straight), quiet=True)
    for step in range(1, 6):
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(straight, cut)
        shutil.rmtree(cut / "adapter")
        (cut / "summary.json").unlink()
        for later in range(step + 1, 7):
            shutil.rmtree(cut / "checkpoints" / f"step-{later}")
        summary = train(settings(files, kind, cut), resume=True, quiet=True)
        assert summary["resumed_from"] == step
        assert adapter_bytes(cut) == adapter_bytes(straight)
        assert unmeasured(metrics(cut)) == unmeasured(metrics(straight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_everything_and_evaluation_nothing(files: Path, kind: str, tmp_path: Path) -> None:
    train(settings(files, kind, tmp_path / "one"), quiet=True)
    train(settings(files, kind, tmp_path / "often", train={"evaluate_every": 1, "save_every": None,
                                                            "keep_checkpoints": "auto"}), quiet=True)  # fmt: skip
    train(settings(files, kind, tmp_path / "never", train={"evaluate_every": "auto"}, data={"valid": None}), quiet=True)
    train(settings(files, kind, tmp_path / "other", train={"seed": 1}), quiet=True)
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "often") == adapter_bytes(tmp_path / "never")
    assert adapter_bytes(tmp_path / "one") != adapter_bytes(tmp_path / "other")


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_pefts(files: Path, kind: str, tmp_path: Path) -> None:
    """PEFT loads what was trained, with equal outputs; so do we what PEFT writes of it."""
    run = settings(files, kind, tmp_path / "run", model={"name": str(files / "still")})
    summary = train(run, quiet=True)
    folder = tmp_path / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    head = json.loads((folder / "head.json").read_text())
    objective = OBJECTIVE[kind]
    names = {"label": ["negative", "positive"], "labels": ["bad", "film", "good"], "tags": ["B-PER", "O"]}.get(kind)
    load: dict[str, Any] = {}
    if names is None:
        assert head == {"pooling": "mean", "normalised": True} and config["task_type"] == "FEATURE_EXTRACTION"
        assert not any("pooler" in target for target in config["target_modules"])
    else:
        assert head["labels"] == names
        assert config["task_type"] == {"tags": "TOKEN_CLS"}.get(kind, "SEQ_CLS")
        assert config["modules_to_save"] == ["classifier", "score"]
        load = Labels(tuple(names), kind == "labels").to_config()
    weights = load_file(folder / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    ids = {"input_ids": torch.tensor([[2, 20, 21, 22, 3], [2, 30, 31, 3, 0]]),
           "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 1, 0]])}  # fmt: skip

    def base() -> Any:
        return AUTO_CLASSES[objective].from_pretrained(files / "still", **load).eval()

    mine = rw.load_adapter(base(), folder)
    theirs = peft.PeftModel.from_pretrained(base(), folder)
    torch.testing.assert_close(mine(**ids)[0], theirs(**ids)[0], atol=1e-6, rtol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    back = rw.load_adapter(base(), tmp_path / "theirs")
    torch.testing.assert_close(back(**ids)[0], mine(**ids)[0], atol=0, rtol=0)


def test_it_learns(files: Path, tmp_path: Path) -> None:
    run = settings(
        files, "label", tmp_path / "run", train={"steps": 40, "save_every": None, "keep_checkpoints": "auto"}
    )
    run["data"]["valid"] = str(files / "label.jsonl")
    train(run, quiet=True)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["valid_accuracy"] > 0.9 and lines[-1]["valid_loss"] < 0.4
    assert 0 <= lines[0]["accuracy"] <= 1


def test_a_head_trains_in_fp32_on_a_bf16_base(files: Path, tmp_path: Path) -> None:
    train(settings(files, "label", tmp_path / "run", train={"precision": "bf16"}), quiet=True)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = weights["base_model.model.classifier.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())


_DISTILBERT = {"n_layers": 1, "n_heads": 2, "dim": 16}
FAMILIES = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {"pad_token_id": 0}),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel, _DISTILBERT),
    "albert": (transformers.AlbertConfig, transformers.AlbertModel, {"embedding_size": 8}),
    "modernbert": (
        transformers.ModernBertConfig, transformers.ModernBertModel,
        {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0},
    ),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"pad_token_id": None}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"n_embd": 16, "n_layer": 1, "n_head": 2}),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a classifier's head, of each family."""
    config_class, model_class, more = FAMILIES[request.param]
    config = config_class(
        vocab_size=len(tiny.word_tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model_class(config).save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["label", "tags"])
def test_families(files: Path, family: Path, kind: str, tmp_path: Path) -> None:
    """Whatever of the head is new is trained and saved: loaded on another draw of it, outputs are the same."""
    run = settings(files, kind, tmp_path / "run", model={"name": str(family)}, train={"steps": 2, "save_every": None,
                   "keep_checkpoints": "auto"}, adapter={"lora_dropout": 0.0})  # fmt: skip
    train(run, quiet=True)
    folder = tmp_path / "run" / "adapter"
    task = {"label": "sequence-classification", "tags": "token-classification"}[kind]
    names = json.loads((folder / "head.json").read_text())["labels"]
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_model(ModelConfig(str(family), "cpu"), torch.float32, task, Labels(tuple(names)))
        assert new_modules(model)
        model.config.pad_token_id = 0
        outputs.append(rw.load_adapter(model, folder)(torch.tensor([[2, 20, 21, 22, 3]])).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
    torch.manual_seed(3)
    base = AUTO_CLASSES[OBJECTIVE[kind]].from_pretrained(family, num_labels=2, pad_token_id=0).eval()
    theirs = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(theirs(torch.tensor([[2, 20, 21, 22, 3]])).logits, outputs[0], atol=1e-5, rtol=1e-5)


def test_going_on_from_an_adapter_keeps_its_labels(files: Path, tmp_path: Path) -> None:
    train(settings(files, "label", tmp_path / "first"), quiet=True)
    fewer = write(tmp_path / "fewer.jsonl", [{"text": "the film", "label": "positive"}] * 8)
    run = settings(files, "label", tmp_path / "second")
    run |= {"adapter": {"from": str(tmp_path / "first" / "adapter")}, "data": {"train": fewer}}
    run["train"]["evaluate_every"] = "auto"
    train(run, quiet=True)
    assert json.loads((tmp_path / "second" / "adapter" / "head.json").read_text())["labels"] == ["negative", "positive"]
    run["data"] = {"train": write(tmp_path / "new.jsonl", [{"text": "a", "label": "neutral"}] * 8)}
    with pytest.raises(RequestError, match="'neutral' is no label of the training data"):
        train(run | {"output": str(tmp_path / "third")}, quiet=True)
    run["data"] = {"train": str(files / "labels.jsonl")}
    with pytest.raises(RequestError, match=r"trained on rows with one label each, data\.train holds rows with several"):
        train(run | {"output": str(tmp_path / "third")}, quiet=True)


@pytest.mark.parametrize(
    ("kind", "sections", "words"),
    [
        ("label", {"train": {"objective": "sft"}}, "is an encoder: its positions see the tokens after them"),
        ("tags", {"train": {"objective": "classification"}}, "holds words with tags .* use train.objective=token-"),
        ("label", {"data": {"packing": True}}, r"data\.packing \(true\) has no effect with train\.objective: classif"),
        ("label", {"train": {"samples": 2}}, r"train\.samples \(2\) has no effect"),
        ("label", {"train": {"temperature": 0.1}}, r"train\.temperature \(0\.1\) has no effect with"),
        ("pairs", {"train": {"pooling": "max"}}, r"train\.pooling can't be 'max'"),
        ("pairs", {"train": {"temperature": 0}}, r"train\.temperature must be more than 0"),
        ("label", {"adapter": {"task_type": "CAUSAL_LM"}}, "task_type .CAUSAL_LM. does not go with"),
        ("label", {"data": {"format": "tags"}}, "data.format: tags holds words with tags"),
    ],
)  # fmt: skip
def test_refused(files: Path, kind: str, sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        train(settings(files, kind, tmp_path / "run", **sections), quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_encoder_decoder_is_refused(files: Path, tmp_path: Path) -> None:
    tiny.t5().save_pretrained(tmp_path / "t5")
    tiny.word_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(RequestError, match="is an encoder-decoder"):
        train(settings(files, "label", tmp_path / "run", model={"name": str(tmp_path / "t5")}), quiet=True)


def test_bad_rows_of_both_splits_at_once(files: Path, tmp_path: Path) -> None:
    run = settings(files, "label", tmp_path / "run")
    bad = [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}, {"text": "", "label": "x"}]
    run["data"] = {
        "train": write(tmp_path / "a.jsonl", bad),
        "valid": write(tmp_path / "b.jsonl", [{"text": "b", "label": "z"}]),
    }
    with pytest.raises(RequestError) as raised:
        train(run, quiet=True)
    assert [(Path(p.file).name, p.line, p.reason) for p in raised.value.problems] == [  # type: ignore[attr-defined]
        ("a.jsonl", 3, "text is empty"), ("b.jsonl", 1, "'z' is no label of the training data; known: x, y"),
    ]  # fmt: skip


def test_trained_parameters_have_gradients(files: Path, tmp_path: Path) -> None:
    """No part of an embedding's adapter is idle: the pooler, which it is not pooled from, is left out."""
    seen: dict[str, bool] = {}

    def look(step: Any) -> None:
        seen[str(step.number)] = True

    train(settings(files, "pairs", tmp_path / "run"), on_step=look, quiet=True)
    model = rw.load_adapter(transformers.AutoModel.from_pretrained(files / "model"), tmp_path / "run" / "adapter", True)
    moved = [name for name, p in adapter_parameters(model).items() if "lora_B" in name and p.abs().max() == 0]
    assert seen and not moved
