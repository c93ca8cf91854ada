"""The table of adapters: adding a line puts the new one under every property test."""

from __future__ import annotations

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dora import DoraLayer
from rankwise.adapters.lora import LoraLayer
from rankwise.adapters.low_rank import LowRankLayer

ADAPTERS: dict[str, type[LowRankLayer]] = {
    "lora": LoraLayer,
    "dora": DoraLayer,
}
"""How a layer's weight can be changed at low rank."""


def adapter_class(config: LoraConfig) -> type[LowRankLayer]:
    """The line of ADAPTERS that a configuration asks for."""
    return ADAPTERS["dora" if config.use_dora else config.kind]
