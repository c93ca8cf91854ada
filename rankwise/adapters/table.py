"""The table of adapters: adding a line puts the new one under every property test."""

from __future__ import annotations

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.dora import DoraLayer
from rankwise.adapters.lora import LoraLayer

ADAPTERS: dict[str, type[LoraLayer] | type[DoraLayer]] = {
    "lora": LoraLayer,
    "dora": DoraLayer,
}
"""How a layer's weight can be changed at low rank."""


def adapter_name(config: LoraConfig) -> str:
    """The line of ADAPTERS that a configuration asks for."""
    return "dora" if config.use_dora else config.kind
