from __future__ import annotations

import pytest

from rankwise.errors import WorkError
from rankwise.export.certificate import Difference
from rankwise.export.report import Row, check_bounds, compared_row, size_of


def test_a_row_has_the_contracts_fields_and_its_own():
    row = Row("x.gguf", 3, ran=False, note="not run here", more={"tensors": 4})
    assert {"artifact", "ran", "max_abs_diff", "kl", "top1_agreement", "bytes", "speedup"} <= set(row.to_dict())
    assert row.to_dict()["tensors"] == 4 and "more" not in row.to_dict()
    assert row.to_dict()["max_abs_diff"] is None, "nothing was compared"


def test_a_row_of_a_difference():
    row = compared_row("a", 7, Difference(1e-3, 1e-4, 1e-6, 0.5, 9), speedup=2.0, bounds={"kl": 1e-5})
    assert row.ran and row.to_dict()["kl"] == 1e-6 and row.top1_agreement == 0.5 and row.speedup == 2.0
    check_bounds([row], "x")


@pytest.mark.parametrize("value", [2e-3, float("nan"), None])
def test_past_a_bound(value):
    row = Row("a", 7, ran=True, max_abs_diff=value, bounds={"max_abs_diff": 1e-3})
    with pytest.raises(WorkError, match=r"'a' differs .* max_abs_diff .* above the bound 0.001; nothing .*; do that"):
        check_bounds([row], "do that")


def test_sizes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"12")
    assert size_of(tmp_path) == 7 and size_of(tmp_path / "c") == 2
