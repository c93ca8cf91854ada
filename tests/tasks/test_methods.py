"""Every method against dense float64 formulas, PEFT's own functions, and the properties that it claims."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from peft.utils import merge_utils

from rankwise.errors import RequestError
from rankwise.tasks.methods import METHODS, Options, Part, distance, num_directions

OF_THE_SUM = ("sum", "cat")
BY_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def part(rank: int, seed: int, scale: float = 1.0, weight: float = 1.0, inputs: int = 12, outputs: int = 10) -> Part:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    return Part(A, torch.randn(outputs, rank, generator=generator, dtype=torch.float64), scale, weight)


def delta(factors) -> torch.Tensor:
    A, B = factors
    return B @ A


def dense_sum(parts) -> torch.Tensor:
    return torch.stack([p.weight * p.scale * (p.B @ p.A) for p in parts]).sum(0)


def seeded(**more) -> Options:
    return Options(generator=torch.Generator().manual_seed(3), **more)


MIXED = [part(3, 1, 2.0, 0.7), part(2, 2, 0.5, -1.3), part(4, 3, 1.5, 0.4)]


@pytest.mark.parametrize("name", METHODS)
def test_one_adapter_with_weight_1_and_density_1_is_itself(name):
    alone = part(4, 5, scale=1.7)
    assert torch.allclose(delta(METHODS[name].combine([alone], seeded())), dense_sum([alone]), atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_order_matters_where_it_is_said_to(name):
    def result(parts):
        return delta(METHODS[name].combine(parts, seeded(density=0.5)))

    same = torch.allclose(result(MIXED), result(MIXED[::-1]), atol=1e-12)
    assert same is not METHODS[name].is_ordered


@pytest.mark.parametrize("name", METHODS)
def test_settings_have_an_effect_where_they_are_said_to(name):
    method = METHODS[name]

    def result(**more):
        seed = more.pop("seed", 0)
        return delta(method.combine(MIXED, Options(**more, generator=torch.Generator().manual_seed(seed))))

    pruned = {"density": 0.5}
    changes = {"rank": {"rank": 1}, "energy": {"energy": 0.3}, "density": pruned, "seed": {**pruned, "seed": 1}}
    for setting, given in changes.items():
        before = result(**({"density": 0.5} if setting == "seed" else {}))
        assert torch.equal(before, result(**given)) is (setting not in method.takes), setting
    assert torch.equal(result(**pruned), result(**pruned)), "the same again"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"energy": 0.9}])
def test_ranks_are_within_what_is_said(name, given):
    method = METHODS[name]
    if not given.keys() <= method.takes:
        return
    options = seeded(**given)
    A, B = method.combine(MIXED, options)
    assert A.shape == (A.shape[0], 12) and B.shape == (10, A.shape[0])
    assert 1 <= A.shape[0] <= method.most_rank([p.rank for p in MIXED], options)


@pytest.mark.parametrize("name", OF_THE_SUM)
def test_sums_are_exact(name):
    found = METHODS[name].combine(MIXED, Options())
    assert torch.allclose(delta(found), dense_sum(MIXED), atol=1e-12)
    assert found[0].shape[0] == 9
    apart, whole = distance(found, MIXED)
    assert apart < 1e-12 and whole == pytest.approx(float(dense_sum(MIXED).norm()), rel=1e-12)


def test_the_sum_has_the_lowest_rank_that_it_can():
    one = part(3, 1)
    twice = [one, dataclasses.replace(one, weight=0.5)]
    shared = [one, dataclasses.replace(part(2, 2), A=one.A[:2])]
    wide = [part(8, 1), part(8, 2)]  # 16 directions, where the weight has 10
    for parts, rank in ((twice, 3), (shared, 3), (wide, 10)):
        A, B = METHODS["sum"].combine(parts, Options())
        assert A.shape[0] == rank == num_directions(parts) and torch.allclose(B @ A, dense_sum(parts), atol=1e-11)


def test_updates_that_cancel_leave_one_direction_of_nothing():
    one = part(3, 1)
    parts = [one, dataclasses.replace(one, weight=-1.0)]
    A, B = METHODS["sum"].combine(parts, Options())
    assert A.shape[0] == 1 and A.norm() > 0.1 and (B @ A).abs().max() < 1e-14
    assert distance((A, B), parts)[1] == 0.0


@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"rank": 30}, {"energy": 0.8}, {"energy": 1.0}])
def test_svd_is_the_best_approximation_of_the_sum(given):
    dense = dense_sum(MIXED)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    A, B = METHODS["svd"].combine(MIXED, Options(**given))
    rank = A.shape[0]
    assert torch.allclose(B @ A, (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-11)
    shares = S.square().cumsum(0) / S.square().sum()
    if "energy" in given:
        assert shares[rank - 1] >= given["energy"] - 1e-9 and (rank == 1 or shares[rank - 2] < given["energy"])
    else:
        assert rank == min(given.get("rank", 4), 9)
    apart, whole = distance((A, B), MIXED)
    assert apart == pytest.approx(float(S[rank:].norm()), abs=1e-11) and whole == pytest.approx(float(dense.norm()))


@pytest.mark.parametrize("name", BY_FACTORS)
@pytest.mark.parametrize("density", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -1.3, 0.4)])
@pytest.mark.filterwarnings("ignore:The density")
def test_factors_are_merged_as_by_peft(name, density, weights):
    parts = [part(4, seed, scale, w) for seed, scale, w in zip((1, 2, 3), (2.0, 0.5, 1.5), weights, strict=True)]
    ours = METHODS[name].combine(parts, Options(density=density, generator=torch.Generator().manual_seed(3)))
    gains = [p.weight * p.scale for p in parts]
    merge = merge_utils.task_arithmetic if name == "linear" else getattr(merge_utils, name)
    more = () if name == "linear" else (density,)
    torch.manual_seed(3)
    for own, factors, signs in zip(ours, ([p.A for p in parts], [p.B for p in parts]), (True, False), strict=True):
        weights_there = torch.tensor([math.copysign(abs(g) ** 0.5, g) if signs else abs(g) ** 0.5 for g in gains])
        theirs = merge([factor.float() for factor in factors], weights_there, *more)
        assert torch.allclose(own.float(), theirs, atol=1e-5)


def test_linear_is_not_the_sum():
    found = METHODS["linear"].combine(MIXED, Options())
    apart, whole = distance(found, MIXED)
    assert apart == pytest.approx(float((delta(found) - dense_sum(MIXED)).norm())) and apart > 0.3 * whole


@pytest.mark.parametrize("name", BY_FACTORS)
def test_lower_ranks_count_as_zeros(name):
    """As if every adapter had the highest rank; which entries are drawn or largest is by the adapter's own size."""
    A, B = METHODS[name].combine(MIXED, seeded())
    same = [
        Part(
            torch.nn.functional.pad(p.A, (0, 0, 0, 4 - p.rank)),
            torch.nn.functional.pad(p.B, (0, 4 - p.rank)),
            p.scale,
            p.weight,
        )
        for p in MIXED
    ]
    assert torch.equal(B @ A, delta(METHODS[name].combine(same, seeded())))


def test_ties_by_hand():
    """Where signs differ the larger sum wins, and the mean is of those that have its sign."""
    columns = torch.tensor([[3.0, -1.0, 0.0, 2.0], [-1.0, -2.0, 0.0, -2.0], [1.0, -3.0, 0.0, 1.0]], dtype=torch.float64)
    parts = [Part(row[None], torch.ones(1, 1, dtype=torch.float64), 1.0, 1.0) for row in columns]
    A, B = METHODS["ties"].combine(parts, Options())
    assert torch.equal(A, torch.tensor([[2.0, -2.0, 0.0, 1.5]], dtype=torch.float64)) and torch.equal(B, parts[0].B)


def test_dare_keeps_the_expected_value():
    one = part(4, 1, inputs=400, outputs=400)
    A, _ = METHODS["dare_linear"].combine([one], seeded(density=0.25))
    kept = A != 0
    assert float(kept.double().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.allclose(A[kept], one.A[kept] / 0.25)


def test_a_density_that_leaves_nothing():
    with pytest.raises(RequestError, match=r"density 0.001 leaves nothing of a factor of 48 entries"):
        METHODS["ties"].combine([part(4, 1)], Options(density=0.001))
