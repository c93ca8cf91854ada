from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from rankwise.errors import RequestError
from rankwise.export.certificate import KL_BOUNDS, Difference, certify, compare, probe_logits, trim_probes


def logits(seed: int, lengths=(5, 70), vocabulary: int = 11) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, vocabulary, generator=generator) for length in lengths]


def test_compare_against_torch():
    first, second = logits(0), logits(1)
    found = compare(first, second)
    a, b = torch.cat(first), torch.cat(second)
    assert found.max_abs_diff == pytest.approx(float((a - b).abs().max()))
    assert found.mean_abs_diff == pytest.approx(float((a - b).abs().mean()))
    wanted = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(wanted), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    assert found.num_tokens == 75
    assert compare(second, first).kl != pytest.approx(found.kl)


def test_equal_logits_differ_by_nothing():
    same = logits(3)
    assert compare(same, same) == Difference(0.0, 0.0, 0.0, 1.0, 75)


def test_a_constant_added_to_all_logits_is_no_divergence():
    first = logits(0)
    found = compare(first, [t + 3.0 for t in first])
    assert found.max_abs_diff == pytest.approx(3.0, abs=1e-5) and found.kl < 1e-12


def test_a_broken_model_fails():
    first, second = logits(0), logits(0)
    second[0][2, 3] = float("nan")
    found = compare(first, second)
    assert math.isnan(found.kl) and math.isnan(found.max_abs_diff)
    assert certify("bf16", found, found, "texts").verdict == "fail"


@pytest.mark.parametrize("dtype", sorted(KL_BOUNDS))
def test_the_bound_decides(dtype):
    effect = Difference(1.0, 1.0, 2.5, 0.5, 9)  # large: the dtype's own bound is what counts
    for factor, verdict in ((0.99, "pass"), (1.01, "fail")):
        merged = Difference(0.1, 0.01, KL_BOUNDS[dtype] * factor, 1.0, 9)
        found = certify(dtype, merged, effect, "texts")
        assert (found.verdict, found.bound, found.adapter_effect_kl) == (verdict, KL_BOUNDS[dtype], 2.5)


def test_a_small_adapter_may_not_drown_in_rounding():
    effect, merged = Difference(1.0, 1.0, 0.01, 0.5, 9), Difference(0.1, 0.01, 0.0051, 1.0, 9)
    assert (certify("bf16", merged, effect, "texts").verdict, certify("bf16", merged, effect, "texts").bound) == (
        "fail",
        0.005,
    )
    nothing = Difference(0.0, 0.0, 0.0, 1.0, 9)
    assert certify("bf16", nothing, nothing, "texts").verdict == "pass", "a fresh adapter"


def test_shapes_must_agree():
    with pytest.raises(RequestError, match="their vocabularies differ"):
        compare(logits(0), logits(0, vocabulary=12))


def test_probes_are_trimmed():
    assert trim_probes([(1, 2, 3), (), (4, 5, 6)], most=5) == [(1, 2, 3), (4, 5)]
    with pytest.raises(RequestError, match="no probe token"):
        trim_probes([(), ()])


def test_probe_logits_are_of_each_probe_alone(llama):
    llama.train()
    found = probe_logits(llama, [(1, 2, 3), (9, 8, 7, 6)])
    assert [tuple(t.shape) for t in found] == [(3, 260), (4, 260)] and llama.training
    with torch.no_grad():
        assert torch.allclose(found[1], llama.eval()(torch.tensor([[9, 8, 7, 6]])).logits[0], atol=1e-6)
