"""Gates in whole models: against each adapter alone, generation, checkpointing, storage, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import rankwise as rw
from rankwise.adapters.gate_config import EmbeddingConfig, GateConfig
from rankwise.attach.attachment import adapter_layers
from rankwise.attach.checkpoint import load_native_state, native_state
from rankwise.attach.gates import parts_of, set_task, tasks_of, train_parts
from rankwise.attach.inject import adapter_parameters, ranks
from rankwise.errors import RequestError
from rankwise.models import blocked
from rankwise.models.attention import SEGMENTED
from rankwise.models.loss import loss_path, token_losses
from rankwise.train.recompute import enable_gradient_checkpointing
from tests import tiny
from tests.attach.gate_cases import TASKS, alone, disturbed, saved_adapters
from tests.models.batches import padded, rows_of

FAMILIES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "llama-tied": lambda: tiny.llama(tied=True)}


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def close(a, b, to=1e-5):
    return float((a - b).abs().max()) <= to * float(b.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_is_its_adapter_alone_and_mixed_rows_are_each_row_alone(family, tmp_path):
    build = FAMILIES[family]
    folders = saved_adapters(tmp_path, build)
    model = rw.attach_gate(build(), folders)
    ids = tiny.token_ids(3)
    singles = {task: logits(alone(folders, task, build), ids) for task in TASKS}
    for task, expected in singles.items():
        with rw.on_task(model, task):
            assert close(logits(model, ids), expected)
    with rw.on_task(model, ["games", "movies", "books"]):
        mixed = logits(model, ids)
    for row, task in enumerate(("games", "movies", "books")):
        assert close(mixed[row], singles[task][row])
    with rw.disabled(model):
        assert torch.equal(logits(model, ids), logits(build(), ids))
    with rw.on_task(model, "movies"), rw.on_task(model, "books"):
        assert close(logits(model, ids), singles["books"])
    rw.detach(model)
    assert torch.equal(logits(model, ids), logits(build(), ids))


def test_no_task_and_unknown_tasks_are_errors(folders):
    model = rw.attach_gate(tiny.llama(), folders)
    assert tasks_of(model) == TASKS
    with pytest.raises(RequestError, match="hard gate needs one of movies, books, games"):
        logits(model, tiny.token_ids())
    with pytest.raises(RequestError, match="unknown task 'gams'; did you mean 'games'"), rw.on_task(model, "gams"):
        pass
    with pytest.raises(RequestError, match="no gate"), rw.on_task(tiny.llama(), "games"):
        pass
    with rw.on_task(model, ["games"] * 3), pytest.raises(RequestError, match="3 rows have a task"):
        logits(model, tiny.token_ids(2))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_beams_and_mixed_tasks(folders, beams):
    model = rw.attach_gate(tiny.llama(), folders)
    ids = tiny.token_ids(3, 6)
    settings = dict(max_new_tokens=8, do_sample=False, num_beams=beams, attention_mask=torch.ones_like(ids))
    with rw.on_task(model, ["books", "games", "movies"]):
        mixed = model.generate(input_ids=ids, **settings)
    settings["attention_mask"] = torch.ones_like(ids[:1])
    outputs = []
    for row, task in enumerate(("books", "games", "movies")):
        expected = alone(folders, task).generate(input_ids=ids[row : row + 1], **settings)[0]
        outputs.append(expected[6:].tolist())
        end = len(expected) if 258 not in expected[6:] else 6 + expected[6:].tolist().index(258) + 1
        assert mixed[row, :end].tolist() == expected[:end].tolist()
    assert len({tuple(output) for output in outputs}) > 1, "the tasks must answer differently for this to say anything"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_rows_of_several_tasks_is_training_each_alone(folders, checkpointing):
    model = rw.attach_gate(tiny.llama(), folders).train()
    ids = tiny.token_ids(2)
    if checkpointing:
        enable_gradient_checkpointing(model)
    set_task(model, torch.tensor([2, 0]))
    model(input_ids=ids, labels=ids).loss.backward()
    set_task(model, None)
    own = adapter_parameters(model)
    for row, (place, task) in enumerate(((2, "games"), (0, "movies"))):
        single = rw.load_adapter(tiny.llama(), folders[task], trainable=True).train()
        (single(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss / 2).backward()
        for name, parameter in adapter_parameters(single).items():
            layer = adapter_layers(model)[name.rpartition(".")[0]]
            place_there = layer.names.index(task)
            found = own[f"{name}.{place_there}"].grad
            if place_there:
                assert layer.owners[place_there] == place
            assert close(found, parameter.grad, 1e-4)
    untouched = [p.grad for name, p in own.items() if name.endswith("q_proj.lora_A.1")]
    assert all(grad is None or not grad.any() for grad in untouched), "no row was of task books"


def test_a_backward_pass_outside_the_block_with_checkpointing_is_an_error(folders):
    model = rw.attach_gate(tiny.llama(), folders).train()
    enable_gradient_checkpointing(model)
    ids = tiny.token_ids(2)
    with rw.on_task(model, "movies"):
        loss = model(input_ids=ids, labels=ids).loss
    with pytest.raises(RequestError, match="backward pass too"):
        loss.backward()


@pytest.mark.parametrize("wanted", ["movies", "games"])
def test_a_top_k_gate_learns_its_shares_with_frozen_adapters(folders, wanted):
    """Two of three take part. The third comes in once the logit of one of them has fallen below its own."""
    model = rw.attach_gate(tiny.llama(), folders, GateConfig("top-k", k=2))
    train_parts(model, ["gate"])
    mixture = model.rankwise_attachment.mixture
    place = TASKS.index(wanted)
    before = mixture.shares(0)[place].item()
    ids = tiny.token_ids()
    target = logits(alone(folders, wanted), ids).softmax(-1)
    optimizer = torch.optim.Adam([mixture.logits], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target.flatten(0, 1))
        loss.backward()
        optimizer.step()
    shares = mixture.shares(0).detach()
    assert before == (0.5 if wanted == "movies" else 0.0) and float(shares[place]) > 0.6
    assert int((shares > 0).sum()) == 2


@pytest.mark.parametrize("per", ["global", "layer", "module"])
def test_a_soft_gate_learns_its_shares_with_frozen_adapters(folders, per):
    model = rw.attach_gate(tiny.llama(), folders, GateConfig("soft", per=per))
    layers = len(ranks(model))
    train_parts(model, ["gate"])
    parameters = {name: p for name, p in adapter_parameters(model).items() if p.requires_grad}
    assert [p.shape for p in parameters.values()] == [({"global": 1, "layer": 2, "module": layers}[per], 3)]
    ids = tiny.token_ids()
    target = logits(alone(folders, "movies"), ids).softmax(-1)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target.flatten(0, 1))
        loss.backward()
        optimizer.step()
    mixture = model.rankwise_attachment.mixture
    shares = torch.stack([mixture.shares(group) for group in range(len(mixture.logits))])
    assert shares[:, 0].mean() > 0.6, "the task's own adapter is what the gate finds"


def test_parts_are_trained_by_name(folders):
    model = rw.attach_gate(tiny.llama(), folders, GateConfig("soft"))
    assert set(parts_of(model)) == {"adapters:movies", "adapters:books", "adapters:games", "gate"}
    train_parts(model, ["adapters:books", "gate"])
    trained = {name for name, p in adapter_parameters(model).items() if p.requires_grad}
    assert trained == {*parts_of(model)["adapters:books"], "rankwise_attachment.mixture.logits"}
    assert all(name[-2:] == ".1" for name in trained if "lora" in name)
    with pytest.raises(RequestError, match="no part 'adapter'"):
        train_parts(model, ["adapter"])


def test_merging_a_chosen_task_or_a_learned_mixture(folders):
    ids = tiny.token_ids()
    model = rw.attach_gate(tiny.llama(), folders)
    with pytest.raises(RequestError, match="needs one of"):
        rw.merge(model)
    with rw.on_task(model, "games"):
        expected = logits(model, ids)
        assert close(logits(rw.merge(model), ids), expected)
    soft = rw.attach_gate(tiny.llama(), folders, GateConfig("soft", per="module"))
    disturbed(soft, 5, 0.3)  # by 1.0 rounding alone is 7e-7 to 3e-5, as the adapters' random starts have it
    expected = logits(soft, ids)
    assert close(logits(rw.merge(soft), ids), expected)


def test_embeddings_start_as_the_shared_adapter_and_learn_apart(folders):
    model = rw.attach_embedding(tiny.llama(), folders["movies"], ["a", "b"])
    ids = tiny.token_ids(2)
    with rw.on_task(model, ["a", "b"]):
        assert close(logits(model, ids), logits(alone(folders, "movies"), ids))
    train_parts(model, ["embedding:b"])
    with rw.on_task(model, ["a", "b"]):
        model(input_ids=ids, labels=ids).loss.backward()
    mixture = model.rankwise_attachment.mixture
    assert mixture.vectors[0].grad is None and mixture.vectors[1].grad.abs().max() > 0
    with pytest.raises(RequestError, match="one rank for all layers"):
        rw.attach_embedding(tiny.llama(), folders["games"], ["a", "b"], EmbeddingConfig("shared"))


def test_fresh_adapters_are_the_base(folders):
    config = rw.LoraConfig(r=4, lora_alpha=8)
    model = rw.attach_gate(tiny.llama(), {"new": config, "old": folders["movies"]})
    ids = tiny.token_ids()
    with rw.on_task(model, "new"):
        assert torch.equal(logits(model, ids), logits(tiny.llama(), ids))
    with rw.on_task(model, "old"):
        assert close(logits(model, ids), logits(alone(folders, "movies"), ids))


def test_a_shared_adapter_beside_those_of_tasks(folders, tmp_path):
    shared = rw.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"])
    model = disturbed(rw.attach_gate(tiny.llama(), {t: folders[t] for t in TASKS[:2]}, shared=shared), 3)
    rw.save_adapter(model, tmp_path / "gate")
    again = rw.load_adapter(tiny.llama(), tmp_path / "gate")
    ids = tiny.token_ids(2)
    with rw.on_task(model, ["books", "movies"]), rw.on_task(again, ["books", "movies"]):
        assert torch.equal(logits(again, ids), logits(model, ids))
    with pytest.raises(RequestError, match="can't be named 'shared'"):
        rw.attach_gate(tiny.llama(), {"shared": shared, "x": shared}, shared=shared)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(use_dora=True), "DoRA's magnitudes"),
        (dict(trainable_token_indices=[1, 2]), "replaces rows of the embedding"),
        (dict(init_lora_weights="pissa"), "can't start from"),
    ],
)
def test_adapters_that_can_t_be_part_of_a_gate(folders, more, message):
    model = tiny.llama()
    config = rw.LoraConfig(**{**dict(r=2, lora_alpha=2, target_modules=["q_proj"]), **more})
    with pytest.raises(RequestError, match=message):
        rw.attach_gate(model, {"a": config, "b": folders["movies"]})
    assert not adapter_layers(model) and torch.equal(
        logits(model, tiny.token_ids()), logits(tiny.llama(), tiny.token_ids())
    )


def test_trained_biases_can_t_be_part_of_a_gate():
    config = rw.LoraConfig(r=2, lora_alpha=2, bias="all", target_modules=["c_attn"])
    with pytest.raises(RequestError, match="trains the base's own"):
        rw.attach_gate(tiny.gpt2(), {"a": config, "b": config})


def test_folders_that_don_t_fit_the_model_or_are_not_there(folders, tmp_path):
    with pytest.raises(RequestError, match=r"adapter 'b' .*is not an adapter"):
        rw.attach_gate(tiny.llama(), {"a": folders["movies"], "b": tmp_path / "nowhere"})
    with pytest.raises(RequestError, match="adapter 'a'"):
        rw.attach_gate(tiny.gpt2(), {"a": folders["movies"], "b": folders["books"]})
    wide = tiny.llama(hidden_size=64)
    with pytest.raises(RequestError, match=r"adapter 'a' .*disagrees"):
        rw.attach_gate(wide, {"a": folders["movies"], "b": folders["books"]})
    with pytest.raises(RequestError, match="can't be used"):
        rw.attach_gate(tiny.llama(), {"../x": folders["movies"], "b": folders["books"]})
    with pytest.raises(RequestError, match="there is no task"):
        rw.attach_gate(tiny.llama(), {})
    with pytest.raises(RequestError, match="no effect with one adapter"):
        rw.attach_gate(tiny.llama(), {"a": folders["movies"]}, GateConfig("soft"))


def test_twenty_tasks_and_ranks_far_apart():
    tasks = {f"task{i}": rw.LoraConfig(r=64 if i == 7 else 1, lora_alpha=2) for i in range(20)}
    model = disturbed(rw.attach_gate(tiny.llama(), tasks), 0)
    assert set(ranks(model).values()) == {19 + 64}
    ids = tiny.token_ids(20)
    with rw.on_task(model, torch.arange(20)):
        mixed = logits(model, ids)
    for task in (0, 7, 19):
        with rw.on_task(model, task):
            assert close(mixed[task], logits(model, ids[task : task + 1])[0])


def test_a_bf16_base(folders):
    model = rw.attach_gate(tiny.llama().bfloat16(), folders)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model).values())
    ids = tiny.token_ids(2)
    single = rw.load_adapter(tiny.llama().bfloat16(), folders["movies"])
    with rw.on_task(model, ["movies", "books"]):
        apart = (logits(model, ids) - logits(single, ids)).float().abs().amax((1, 2))
    assert apart[0] < 0.05 and apart[1] > 4 * apart[0], "the other adapter is not as near"


def test_copies_are_apart(folders):
    model = rw.attach_gate(tiny.llama(), folders, GateConfig("soft"))
    other = copy.deepcopy(model)
    ids = tiny.token_ids()
    with rw.on_task(other, "books"):
        assert close(logits(other, ids), logits(alone(folders, "books"), ids))
        assert not close(logits(model, ids), logits(other, ids), 1e-3)


def test_tasks_json_is_small_and_says_all(folders, tmp_path):
    model = rw.attach_gate(tiny.llama(), folders, GateConfig("soft", per="layer", temperature=2.0))
    disturbed(model, 4)
    rw.save_adapter(model, tmp_path / "gate")
    content = json.loads((tmp_path / "gate" / "tasks.json").read_text())
    assert content == {
        "tasks": list(TASKS),
        "adapters": {task: task for task in TASKS},
        "gate": {"mode": "soft", "per": "layer", "temperature": 2.0},
        "format": 1,
    }
    again = rw.load_adapter(tiny.llama(), tmp_path / "gate")
    ids = tiny.token_ids()
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not any(p.requires_grad for p in again.parameters())


def test_an_adapted_embedding_and_one_with_another_vocabulary(folders, tmp_path):
    one = disturbed(rw.attach(tiny.llama(), rw.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])), 1)
    rw.save_adapter(one, tmp_path / "one")
    model = rw.attach_gate(tiny.llama(), {"one": tmp_path / "one", "movies": folders["movies"]})
    ids = tiny.token_ids(2)
    with rw.on_task(model, ["movies", "one"]):
        mixed = logits(model, ids)
    assert close(mixed[0], logits(alone(folders, "movies"), ids)[0]) and close(mixed[1], logits(one, ids)[1])
    wide = tiny.llama()
    wide.resize_token_embeddings(270)
    rw.attach(wide, rw.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    rw.save_adapter(wide, tmp_path / "wide")
    with pytest.raises(RequestError, match="embeddings of its own"):
        rw.attach_gate(tiny.llama(), {"a": tmp_path / "wide", "b": folders["movies"]})


@pytest.mark.parametrize("storage", ["8bit", "nf4"])
def test_a_base_in_8_or_4_bits(storage, tmp_path):
    from tests import bits

    def build():
        return bits.llama(storage)

    folders = saved_adapters(tmp_path, build, ("movies", "books"))
    model = rw.attach_gate(build(), folders)
    ids = tiny.token_ids(2)
    with rw.on_task(model, ["books", "movies"]):
        mixed = logits(model, ids)
    for row, task in enumerate(("books", "movies")):
        single = logits(alone(folders, task, build), ids)
        assert close(mixed[row], single[row], 2e-2), "8 bits round each batch of rows on its own"
        with rw.on_task(model, task):
            assert close(logits(model, ids), single, 1e-4)


@pytest.mark.parametrize("what", ["soft", "embedding"])
def test_the_native_state_goes_back_in_to_the_last_bit(what, folders):
    def build():
        if what == "soft":
            return rw.attach_gate(tiny.llama(), folders, GateConfig("soft", per="layer"))
        return rw.attach_embedding(tiny.llama(), folders["movies"], ["a", "b"])

    model, other = disturbed(build(), 3), build()
    load_native_state(other, {name: tensor.clone() for name, tensor in native_state(model).items()})
    ids = tiny.token_ids(2)
    given = {"soft": None, "embedding": "b"}[what]
    set_task(model, given)
    set_task(other, given)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert any("mixture" in name for name in native_state(model))


def test_rows_of_several_tasks_in_bf16_go_through_blocks(folders, monkeypatch):
    """Attention by blocks is proven on the batch itself: another number of rows would not fit its tasks."""
    monkeypatch.setattr(blocked, "has_bf16_products", lambda: True)
    rows = rows_of((19, 5, 12))
    model = rw.attach_gate(tiny.llama().bfloat16(), folders)
    with rw.on_task(model, "games"):
        loss_path(model, padded(rows))  # which looks at one row
    with rw.on_task(model, ["games", "movies", "books"]):
        together = token_losses(model, padded(rows))
    assert model.config._attn_implementation == SEGMENTED["sdpa"]
    for row, task in zip(rows, ("games", "movies", "books"), strict=True):
        with rw.on_task(model, task):
            one = token_losses(model, padded([row]))
        found, together = together[: len(one)], together[len(one) :]
        torch.testing.assert_close(found, one, rtol=0.02, atol=0.02)
