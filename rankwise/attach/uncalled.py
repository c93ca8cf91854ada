"""Layers of transformers' models whose weights are read by the module around them, while the layers are never called.

An adapter there would do nothing: it would get no gradient, and once merged it would change the model all the same.
`all-linear` leaves such layers out, and naming one is refused. Two tables, found by a search through transformers 5.24
for `self.LAYER.weight` in what is computed: layers that are always read, and layers of Mamba and its kin that a fused
CUDA kernel reads in training (PEFT refuses some of those by the type of the model).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

ALWAYS_READ: dict[str, tuple[str, ...]] = {
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MambaMixer": ("dt_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
"""By the class of the module around them."""

READ_BY_KERNELS: dict[str, tuple[str, ...]] = {
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "out_proj"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}
"""In training, where the kernels are installed; elsewhere they are called."""


def why_uncalled(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Who reads the weight of layer `name` without calling it, in words; None for a layer that is called."""
    path, _, leaf = name.rpartition(".")
    owner = type(modules[path])
    if not owner.__module__.startswith("transformers.models."):
        return None
    for cls in owner.__mro__:
        if leaf in ALWAYS_READ.get(cls.__name__, ()):
            return f"{owner.__name__} reads its weight and never calls it"
        if leaf in READ_BY_KERNELS.get(cls.__name__, ()):
            return f"in training on CUDA a fused kernel of {owner.__name__} reads its weight without calling it"
    return None
