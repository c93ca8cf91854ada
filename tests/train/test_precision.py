from __future__ import annotations

import pytest
import torch

from rankwise.train import precision
from rankwise.train.precision import choose_precision, probe

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_named_precision_is_taken_as_it_is(name: str, dtype: torch.dtype) -> None:
    assert choose_precision(name, CPU).dtype == dtype


@pytest.mark.parametrize(
    ("fp32_s", "bf16_s", "taken"),
    [(3.0, 1.0, "bf16"), (1.0, 1.0, "fp32"), (1.1, 1.0, "fp32"), (1.0, 9.0, "fp32")],
)
def test_auto_takes_bf16_only_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float, taken: str
) -> None:
    monkeypatch.setattr(precision, "probe", lambda device: (fp32_s, bf16_s))
    found = choose_precision("auto", CPU)
    assert found.name == taken
    assert "fp32" in found.why and "ms" in found.why


def test_the_probe_measures_both() -> None:
    assert all(seconds > 0 for seconds in probe(CPU))
