"""Ranks from names and sizes: plans, depth, budgets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.adapters.config import LoraConfig
from rankwise.attach.checkpoint import save_adapter
from rankwise.attach.inject import adapter_parameters, attach, ranks
from rankwise.attach.targets import find_targets
from rankwise.errors import RequestError
from rankwise.ranks.config import RanksConfig
from rankwise.ranks.layered import check_budget, depths, fit_to_budget, layer_kinds, planned, ramp
from rankwise.ranks.sizes import measure_sizes
from rankwise.recipes.rank_plan import with_layered_ranks
from tests import tiny

ARTICLE = {"attn.c_attn": 16, "mlp.fc_in": 8, "mlp.fc_out": 4}


def names_of(model) -> list[str]:
    return [target.name for target in find_targets(model, LoraConfig())]


def attached(model, policy: dict, said: list[str] | None = None, **adapter):
    config = LoraConfig(**{"r": 6, **adapter})
    say = (lambda _: None) if said is None else said.append
    return attach(model, with_layered_ranks(model, config, RanksConfig(policy="layered", **policy), say))


def ending(model, end: str) -> set[int]:
    return {rank for name, rank in ranks(model).items() if name.endswith(end)}


# --- plans ---------------------------------------------------------------------------------------------------------


def test_the_articles_plan_on_gptj():
    said: list[str] = []
    model = attached(tiny.gptj(), {"plan": ARTICLE}, said)
    assert ending(model, "fc_in") == {8} and ending(model, "fc_out") == {4}
    assert ending(model, "q_proj") == ending(model, "k_proj") == ending(model, "v_proj") == {16}
    assert ending(model, "out_proj") == {6}, "adapter.r where no pattern fits"
    assert said == ["ranks.plan['attn.c_attn']: this model keeps what c_attn computes apart, in q_proj, k_proj, v_proj"]


def test_the_articles_plan_on_gpt2_names_what_fits():
    with pytest.raises(RequestError, match=r"ranks\.plan\['mlp\.fc_in'\] fits no adapted layer") as caught:
        attached(tiny.gpt2(), {"plan": ARTICLE})
    assert str(caught.value).endswith("Names that fit: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj")


def test_expressions_first_come_first_served_and_zero_leaves_out():
    plan = {r"layers\.0\.mlp\.(gate|up)_proj": 0, "mlp.*": 3, "q_proj": 5}
    model = attached(tiny.llama(), {"plan": plan})
    found = ranks(model)
    assert not any("layers.0.mlp.gate" in name or "layers.0.mlp.up" in name for name in found)
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.mlp.up_proj"] == 3
    assert ending(model, "q_proj") == {5} and ending(model, "o_proj") == {6}
    assert len(found) == 12


def test_a_plan_of_layers_that_are_no_targets():
    with pytest.raises(RequestError, match=r"'mlp\.up_proj'\] fits no adapted layer.*self_attn\.q_proj"):
        attached(tiny.llama(), {"plan": {"mlp.up_proj": 3}}, target_modules=["q_proj"])


def test_a_plan_that_leaves_all_out():
    with pytest.raises(RequestError, match="leaves every layer out"):
        attached(tiny.llama(), {"plan": {".*": 0, "q_proj": 3}})


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_is_kept_or_goes_with_the_rank(use_rslora):
    plan = {"q_proj": 3, "k_proj": 12}
    kept = attached(tiny.llama(), {"plan": plan}, lora_alpha=12, use_rslora=use_rslora)
    scaled = attached(tiny.llama(), {"plan": plan, "alpha": "scale"}, lora_alpha=12, alpha_pattern={"v_proj": 6})
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert kept.get_submodule(q).scale == pytest.approx(12 / 3 if not use_rslora else 12 / 3**0.5)
    assert {scaled.get_submodule(name).scale for name in ranks(scaled) if "v_proj" not in name} == {2.0}
    assert scaled.get_submodule(v).scale == 1.0


# --- depth ---------------------------------------------------------------------------------------------------------


def test_depth_of_blocks_ends_and_stacks():
    names = ["embed", "layers.0.q", "layers.1.q", "layers.2.experts.7.w", "layers.2.experts.0.w", "head"]
    assert depths(names) == {
        "embed": 0.0, "layers.0.q": 0.0, "layers.1.q": 0.5, "layers.2.experts.7.w": 1.0, "layers.2.experts.0.w": 1.0,
        "head": 1.0,
    }  # fmt: skip
    both = depths(names_of(tiny.t5()))
    assert both["encoder.block.0.layer.0.SelfAttention.q"] == both["decoder.block.0.layer.0.SelfAttention.q"] == 0.0
    assert both["encoder.block.1.layer.0.SelfAttention.q"] == both["decoder.block.1.layer.0.SelfAttention.q"] == 1.0
    assert depths(["h.5.a", "h.5.b"]) == {"h.5.a": 0.0, "h.5.b": 0.0}, "one block"


def test_ramps():
    names = [f"h.{number}.q" for number in range(5)]
    assert list(ramp(names, "up", 2, 10).values()) == [2, 4, 6, 8, 10]
    assert list(ramp(names, "down", 2, 10).values()) == [10, 8, 6, 4, 2]
    assert list(ramp(names, "hump", 2, 10).values()) == [2, 6, 10, 6, 2]
    model = attached(tiny.llama(), {"depth": "up", "min": 2, "max": 9})
    assert ending(model, "0.self_attn.q_proj") == {2} and ending(model, "1.mlp.up_proj") == {9}
    assert set(ranks(attached(tiny.llama(), {"depth": "down"})).values()) == {3, 9}, "half and one and a half of r"


# --- budgets -------------------------------------------------------------------------------------------------------


ADAPTERS = [
    {}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]},
    {"target_modules": ["embed_tokens", "q_proj"]}, {"init_lora_weights": "pissa"},
]  # fmt: skip
SHAPES = [{"plan": {"q_proj": 4, "mlp.*": 2, "k_proj": 0}}, {"depth": "hump", "min": 2, "max": 30}, {}]


@pytest.mark.parametrize(("shape", "adapter"), [({}, adapter) for adapter in ADAPTERS] + [(s, {}) for s in SHAPES[:2]])
@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_budget_is_met_to_within_one_rank(shape, adapter, in_bytes, tmp_path):
    amount = 70_000 if in_bytes else 17_500
    if "target_modules" in adapter:
        amount = 65_000 if in_bytes else 9_000  # the file holds the whole embeddings too
    model = attached(tiny.llama(), {**shape, "budget": f"{amount} B" if in_bytes else amount}, **adapter)
    save_adapter(model, tmp_path / "a")
    layers = [model.get_submodule(name) for name in ranks(model)]
    one_rank = min(layer.lora_A[0].numel() + layer.lora_B[:, 0].numel() for layer in layers)
    used = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    if in_bytes:
        used = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
        one_rank *= 4 * (2 if "init_lora_weights" in adapter else 1)
        one_rank += 64  # a longer number in the header pads it
    assert used <= amount < used + one_rank


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_sizes_are_those_of_the_file(adapter, tmp_path):
    model, config = tiny.llama(), LoraConfig(r=4, **adapter)
    before = {name: id(module) for name, module in model.named_modules()}
    sizes = measure_sizes(model, config)
    assert {name: id(module) for name, module in model.named_modules()} == before
    wanted = {name: 1 + number % 5 for number, name in enumerate(sizes.costs)}
    attach(model, config.with_(rank_pattern=wanted))
    save_adapter(model, tmp_path / "a")
    assert sizes.parameters(wanted) == sum(p.numel() for p in adapter_parameters(model).values())
    assert sizes.file_bytes(wanted) == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


def test_biases_count():
    model, config = tiny.gpt2(), LoraConfig(r=4, bias="lora_only")
    sizes = measure_sizes(model, config)
    attach(model, config)
    assert sizes.parameters(ranks(model)) == sum(p.numel() for p in adapter_parameters(model).values())


def test_budgets_that_can_not_be_met():
    with pytest.raises(RequestError, match=r"ranks\.budget \(100\) is below [\d,]+, which the least ranks take"):
        attached(tiny.llama(), {"budget": 100})
    with pytest.raises(RequestError, match=r"is above [\d,]+, which the highest ranks take"):
        attached(tiny.llama(), {"budget": 10_000, "max": 2})


@given(
    layers=st.lists(
        st.tuples(st.integers(1, 50), st.floats(0.1, 20), st.integers(1, 4), st.integers(4, 40)), min_size=1, max_size=8
    ),
    share=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_budget_between_the_bounds(layers, share):
    costs, weights, least, most = ({str(i): row[k] for i, row in enumerate(layers)} for k in range(4))

    def total(found):
        return sum(costs[name] * rank for name, rank in found.items())

    budget = int(total(least) + share * (total(most) - total(least)))
    found = fit_to_budget(weights, least, most, total, budget)
    assert total(found) <= budget and all(least[name] <= rank <= most[name] for name, rank in found.items())
    assert all(rank == most[name] or total(found) + costs[name] > budget for name, rank in found.items())


def test_equal_weights_give_equal_ranks():
    names = [str(number) for number in range(10)]
    ones, high = dict.fromkeys(names, 1), dict.fromkeys(names, 99)
    found = fit_to_budget(dict.fromkeys(names, 1.0), ones, high, lambda r: 7 * sum(r.values()), 7 * 83)
    assert sorted(found.values()) == [8] * 7 + [9] * 3
    with pytest.raises(RequestError):
        check_budget(ones, high, lambda r: sum(r.values()), 9)


def test_kinds_are_ends_of_names():
    assert layer_kinds(["a.0.x.q", "a.1.x.q", "a.0.1", "w", "a.3.w"]) == ["x.q", "1", "w"]
    assert planned(["a.0.q", "a.0.k"], {"q": 0}, 2) == {"a.0.q": 0, "a.0.k": 2}
