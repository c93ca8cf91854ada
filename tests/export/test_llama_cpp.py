"""The GGUF files in llama.cpp itself, where the package llama-cpp-python is installed (it compiles for minutes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rankwise.adapters.config import LoraConfig
from rankwise.attach.inject import adapter_parameters, attach, detach
from rankwise.export.certificate import Difference, compare, probe_logits
from rankwise.export.gguf_file import write_gguf
from rankwise.export.gguf_lora import write_lora
from rankwise.export.gguf_tokenizer import HARD_TEXTS, vocabulary_of
from rankwise.models.config import ModelConfig
from rankwise.models.load import load_model, load_tokenizer
from rankwise.recipes.merge import TEXTS
from tests.export.gguf_models import CUTTERS, FAMILIES, attached, bpe_tokenizer, llama, piece_tokenizer

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

PROBE = torch.randint(3, 400, (48,), generator=torch.Generator().manual_seed(0)).tolist()
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {**FAMILIES, "yarn-rope": lambda: llama(rope_parameters=YARN)}


def written(model, path: Path, dtype: str = "f32", tokenizer=None) -> Path:
    tokenizer = bpe_tokenizer() if tokenizer is None else tokenizer
    told = vocabulary_of(tokenizer, model.config.vocab_size, tokenizer.chat_template)
    write_gguf(model, told, path, dtype, "tiny")
    return path


def loaded(path: Path, **more):
    """With a cache in fp32: by default it is fp16, which would be what is measured."""
    return llama_cpp.Llama(
        str(path), logits_all=True, n_ctx=256, n_batch=256, n_threads=1, type_k=0, type_v=0, verbose=False, **more
    )


def theirs(path: Path, tokens: list[int] = PROBE, **more) -> torch.Tensor:
    runner = loaded(path, **more)
    runner.eval(tokens)
    return torch.from_numpy(np.array(runner.scores[: len(tokens)]))


def difference(model, path: Path, **more) -> Difference:
    return compare(probe_logits(model, [PROBE]), [theirs(path, **more)])


@pytest.mark.parametrize("family", MODELS)
def test_f32(family, tmp_path):
    model = MODELS[family]()
    found = difference(model, written(model, tmp_path / "m.gguf"))
    assert found.max_abs_diff < 1e-3 and found.top1_agreement == 1.0


def test_q8_0(tmp_path):
    model = llama()
    assert difference(model, written(model, tmp_path / "m.gguf", "q8_0")).kl < 1e-2


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 5}}])
@pytest.mark.parametrize("family", ["llama-untied", "qwen2", "qwen3", "mistral"])
def test_an_adapter_by_path(family, fields, tmp_path):
    model = attached(FAMILIES[family](), **fields)
    write_lora(model, tmp_path / "a.gguf", "tiny")
    adapted = probe_logits(model, [PROBE])
    base = written(detach(model), tmp_path / "m.gguf")
    found = compare(adapted, [theirs(base, lora_path=str(tmp_path / "a.gguf"))])
    assert found.max_abs_diff < 1e-3
    assert compare(adapted, [theirs(base)]).kl > 1e-4, "without the adapter it is another model"


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_an_adapter_of_the_demo_model(dtype, tmp_path, capsys):
    """On real weights, whose activations have a few large channels; the adapter moves the logits by units."""
    model, tokenizer = load_model(ModelConfig("demo", "cpu"), torch.float32), load_tokenizer(ModelConfig("demo", "cpu"))
    tokens = [token for text in TEXTS for token in tokenizer(text)["input_ids"]][:192]
    torch.manual_seed(0)
    attach(model, LoraConfig(r=16, lora_alpha=32, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.mul_(0.15 if "lora_B" in name else 1.0)
    write_lora(model, tmp_path / "a.gguf", "demo")
    adapted = probe_logits(model, [tokens])
    base = written(detach(model), tmp_path / "m.gguf", dtype, tokenizer)
    alone = compare(probe_logits(model, [tokens]), [theirs(base, tokens)])
    found = compare(adapted, [theirs(base, tokens, lora_path=str(tmp_path / "a.gguf"))])
    effect = compare(adapted, [theirs(base, tokens)])
    with capsys.disabled():
        print(f"\n{dtype}: base {alone}\nwith the adapter {found}\nwithout it {effect}")
    assert effect.max_abs_diff > 1.0 and effect.kl > 2 * found.kl
    assert found.max_abs_diff < 1e-3 if dtype == "f32" else found.kl < 1e-2


TOKENIZERS = {**{kind: (lambda kind=kind: bpe_tokenizer(kind)) for kind in CUTTERS}, "pieces": piece_tokenizer}
TOKENIZERS["pieces-prepended"] = lambda: piece_tokenizer(prepends=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_are_cut_as_the_tokenizer_cuts_them(kind, tmp_path):
    """That the name of the pre-tokeniser means the same there."""
    tokenizer = TOKENIZERS[kind]()
    runner = loaded(written(llama(), tmp_path / "m.gguf", tokenizer=tokenizer))
    special = [f"a{token}\nb" for token in tokenizer.all_special_tokens] if "pieces" not in kind else []
    wrong = []
    for text in (*HARD_TEXTS, *special):
        if (kind in ("qwen2", "tekken") and "\u0301" in text) or (kind == "pieces" and text.startswith(" ")):
            continue  # what `Vocabulary.notes` says
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = runner.tokenize(text.encode(), add_bos=False, special=True)
        if found != wanted:
            wrong.append((text, found, wanted))
    assert not wrong
