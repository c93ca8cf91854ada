"""Which model, and where it runs: the `model:` section of a run file."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.errors import RequestError, did_you_mean

QUANTIZATIONS = ("none", "8bit", "4bit")
FOUR_BIT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the base model.

    Args:
        name: a Hub id, a local folder, `demo` or `demo-encoder`.
        device: cpu, cuda, mps (with `:N`), or auto.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether the model's own Python code may run.
        quantization: how the weights of the linear layers inside the blocks are stored: `none`, `8bit` or `4bit`.
        quantization_type: of `4bit`: `nf4` or `fp4`; not given: nf4.
        double_quantization: of `4bit`: whether the scales are stored in 8 bits; not given: they are.

    Raises: RequestError for a value that is not known, or a setting without effect.
    """

    name: str = "demo"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: str = "none"
    quantization_type: str | None = None
    double_quantization: bool | None = None

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise RequestError(
                f"model.quantization can't be '{self.quantization}'{did_you_mean(self.quantization, QUANTIZATIONS)}"
            )
        if self.quantization_type is not None and self.quantization_type not in FOUR_BIT_TYPES:
            near = did_you_mean(self.quantization_type, FOUR_BIT_TYPES)
            raise RequestError(f"model.quantization_type can't be '{self.quantization_type}'{near}")
        if self.quantization == "4bit":
            return
        for name in ("quantization_type", "double_quantization"):
            if (value := getattr(self, name)) is not None:
                raise RequestError(
                    f"model.{name} ({value}) has no effect with model.quantization: {self.quantization}; leave it out, "
                    "or set quantization to 4bit"
                )

    @property
    def is_quantized(self) -> bool:
        """Whether the run asks for 8 or 4 bits."""
        return self.quantization != "none"

    @property
    def four_bit_type(self) -> str:
        """`quantization_type`, filled in."""
        return self.quantization_type or FOUR_BIT_TYPES[0]

    @property
    def is_double_quantized(self) -> bool:
        """`double_quantization`, filled in."""
        return self.double_quantization is not False
