"""A gate on disk: a folder of PEFT folders, one for each adapter, and what makes them one.

tasks.json          tasks, the gate's or the embedding's settings, each adapter and the task that it is of
tasks.safetensors   logits/GROUP [T]; vectors/TASK[/LAYER] [r]; router/weight [T, d] and router/bias [T]
NAME/               PEFT's folder of one adapter, and provenance.json where something is known of its base
head.json           what a head means, as in an adapter's own folder

PEFT and `load_adapter` take a folder inside by itself. It is what its task computes only where nothing is shared
(`shared`, `isolate`, embeddings), and vLLM knows no patterns and no heads: `rankwise fold --task` makes what is both.

The folder is written whole or not at all. What does not fit `tasks.json`, the adapters or the model is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.config import LoraConfig
from rankwise.adapters.gate import GateLayer
from rankwise.adapters.gate_config import SHARED, EmbeddingConfig, GateConfig, check_names
from rankwise.adapters.head_gate import HeadGate
from rankwise.adapters.low_rank import scale_of
from rankwise.adapters.mixture import Mixture
from rankwise.attach import peft_format
from rankwise.attach.attachment import (
    adapter_layers,
    attachment_of,
    need_active,
    need_attachment,
    unchanged_on_error,
)
from rankwise.attach.bases import PROVENANCE_FILE, check_bases, model_weight_hashes
from rankwise.attach.checkpoint import HEAD_FILE, TASKS_FILE, read_head
from rankwise.attach.gates import assemble, mixture_of, taken_out
from rankwise.attach.inject import adapter_parameters, detach
from rankwise.attach.targets import alpha_in, rank_in
from rankwise.attach.weights_file import read_weights
from rankwise.config import build
from rankwise.errors import RequestError, WorkError
from rankwise.files import read_json_object, replacing_folder
from rankwise.say import silent

Model = TypeVar("Model", bound=nn.Module)
Path_ = str | os.PathLike[str]

TABLES_FILE = "tasks.safetensors"
FORMAT = 1
"""Of `tasks.json`."""


@dataclass(frozen=True)
class GateFolder:
    """What `tasks.json` says.

    Args:
        tasks: names, in the order of logits.
        adapters: folders below, and the task of each; None: it takes part whatever the task is.
        gate, embedding: the settings of the one or the other.
        router: what is known of the classifier (rows, accuracy); None where there is none.
    """

    tasks: list[str]
    adapters: dict[str, str | None]
    gate: GateConfig | None = None
    embedding: EmbeddingConfig | None = None
    router: dict[str, Any] | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise RequestError(f"format {self.format!r} is not one that this version reads ({FORMAT})")
        check_names(self.tasks)
        check_names(self.adapters, "adapter")
        if (self.gate is None) == (self.embedding is None):
            raise RequestError("it must have a gate or an embedding, one of them")
        for name, task in self.adapters.items():
            if task is not None and task not in self.tasks:
                raise RequestError(f"adapter '{name}' is of task '{task}', which is not among {', '.join(self.tasks)}")
        if self.embedding is not None and list(self.adapters.items()) != [(SHARED, None)]:
            raise RequestError(f"task embeddings have one adapter, '{SHARED}', of no task")
        owned = [task for task in self.adapters.values() if task is not None]
        if self.gate is not None and owned != self.tasks:
            raise RequestError("each task needs one adapter, in the order of the tasks")
        if self.gate is not None:
            self.gate.check_tasks(self.tasks)

    @property
    def settings(self) -> GateConfig | EmbeddingConfig:
        """Of the gate, or of the embedding."""
        settings = self.gate if self.gate is not None else self.embedding
        assert settings is not None
        return settings


@dataclass(frozen=True)
class _Plain:
    """`tasks.json` without its sections."""

    tasks: list[str]
    adapters: dict[str, str | None]
    router: dict[str, Any] | None = None
    format: int = FORMAT


def is_gate_folder(folder: Path_) -> bool:
    """Whether this is a folder of several adapters."""
    return (Path(folder) / TASKS_FILE).is_file()


def read_gate_folder(folder: Path_) -> GateFolder:
    """What the folder's `tasks.json` says. Raises: RequestError for one that is not there or can't be."""
    path = Path(folder) / TASKS_FILE
    content = read_json_object(path)
    sections = {"gate": GateConfig, "embedding": EmbeddingConfig}
    try:
        for key, section in sections.items():
            if content.get(key) is not None:
                content[key] = build(section, content[key], key)
        plain = build(_Plain, {key: value for key, value in content.items() if key not in sections}, TASKS_FILE)
        settings = {key: content.get(key) for key in sections}
        spec = GateFolder(plain.tasks, plain.adapters, router=plain.router, format=plain.format, **settings)
    except RequestError as error:
        raise RequestError(f"'{path}': {error}") from None
    for name in spec.adapters:
        if not (Path(folder) / name / peft_format.CONFIG_FILE).is_file():
            raise RequestError(f"'{folder}' lacks the adapter '{name}' that its {TASKS_FILE} names")
    return spec


def read_tables(folder: Path_) -> dict[str, Tensor]:
    """Logits, vectors and classifier; nothing where the gate has none.

    Raises: RequestError for a torn file, and for values that are not finite.
    """
    path = Path(folder) / TABLES_FILE
    if not path.is_file():
        return {}
    weights = read_weights(path)
    broken = weights.not_finite()
    if broken is not None:
        raise RequestError(f"'{broken}' in '{path}' holds values that are not finite; the folder is broken")
    return {name: tensor.float() for name, tensor in weights.tensors.items()}


def check_tables(where: Path_, wanted: Mapping[str, tuple[int, ...]], tables: Mapping[str, Tensor]) -> None:
    """Raises: RequestError when the tables are not exactly those that are wanted."""
    for name, shape in wanted.items():
        if name not in tables:
            raise RequestError(f"'{where}' lacks '{name}' in its {TABLES_FILE}")
        if tuple(tables[name].shape) != shape:
            raise RequestError(
                f"'{name}' in '{where}' has shape {list(tables[name].shape)} where its adapters need {list(shape)}"
            )
    strange = [name for name in tables if name not in wanted]
    if strange:
        raise RequestError(
            f"'{where}' holds '{strange[0]}' in its {TABLES_FILE}, which its {TASKS_FILE} has no place for"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def save_gate(model: nn.Module, folder: Path_) -> None:
    """Writes the attached gate. Other files of a folder that is there stay; the adapters that it held are replaced.

    Raises: RequestError when no gate is attached; WorkError for weights that are not finite or a disk that is full.
    """
    attachment = need_attachment(model)
    spec = folder_of(model)
    target = Path(folder)
    tables = tables_of(model)
    for name, tensor in tables.items():
        if not torch.isfinite(tensor).all():
            raise WorkError(f"'{name}' holds values that are not finite; the gate was not saved")
    contents = {name: (member_config(model, name), member_tensors(model, name)) for name in attachment.members}
    for name, (_, tensors) in contents.items():
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise WorkError(f"'{key}' of '{name}' holds values that are not finite; the gate was not saved")
    heads = None if attachment.head is None else json.dumps(attachment.head, indent=2, ensure_ascii=False)
    with replacing_folder(target) as new:
        if target.is_dir():
            _keep_others(target, new, spec)
        for name, (fields, tensors) in contents.items():
            (new / name).mkdir()
            _write_adapter(new / name, fields, tensors, heads if _has_head(model, name) else None)
            if name in attachment.bases:
                text = json.dumps({"base": attachment.bases[name]}, indent=2, ensure_ascii=False)
                (new / name / PROVENANCE_FILE).write_text(text, encoding="utf-8")
        if tables:
            (new / TABLES_FILE).write_bytes(save(tables, metadata={"format": "pt"}))
        if heads is not None:
            (new / HEAD_FILE).write_text(heads, encoding="utf-8")
        text = json.dumps(without_none(asdict(spec)), indent=2, ensure_ascii=False)
        (new / TASKS_FILE).write_text(text, encoding="utf-8")


def without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not set are left out; an adapter of no task stays null."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == "adapters":
            found[key] = value
        elif isinstance(value, Mapping):
            found[key] = without_none(value)
        elif value is not None:
            found[key] = value
    return found


def _keep_others(old: Path, new: Path, spec: GateFolder) -> None:
    """Copies what is not the gate's own: a tokenizer's files, say."""
    ours = {TASKS_FILE, TABLES_FILE, HEAD_FILE, peft_format.CONFIG_FILE, peft_format.WEIGHTS_FILE, *spec.adapters}
    if is_gate_folder(old):
        ours |= set(read_gate_folder(old).adapters)
    for entry in old.iterdir():
        if entry.name not in ours and not (entry.name.startswith(".") and entry.name.endswith((".tmp", ".old"))):
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, new / entry.name)


def _write_adapter(folder: Path, fields: Mapping[str, object], tensors: Mapping[str, Tensor], head: str | None) -> None:
    (folder / peft_format.WEIGHTS_FILE).write_bytes(save(peft_format.to_file(tensors), metadata={"format": "pt"}))
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / peft_format.CONFIG_FILE).write_text(text, encoding="utf-8")
    if head is not None:
        (folder / HEAD_FILE).write_text(head, encoding="utf-8")


def folder_of(model: nn.Module) -> GateFolder:
    """What `tasks.json` says of the attached gate."""
    mixture, attachment = mixture_of(model), need_attachment(model)
    adapters: dict[str, str | None] = {name: name if name in mixture.tasks else None for name in attachment.members}
    if mixture.embedding is not None:
        adapters = {SHARED: None}
    return GateFolder(list(mixture.tasks), adapters, mixture.gate, mixture.embedding, mixture.router_report)


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """The content of `tasks.safetensors`, on the CPU, apart from the model."""
    mixture = mixture_of(model)
    found: dict[str, Tensor] = {}
    if mixture.logits is not None:
        found = {f"logits/{name}": mixture.logits[place] for place, name in enumerate(mixture.groups)}
    for task, vector in zip(mixture.tasks, mixture.vectors, strict=False):
        for name, (first, last) in _entries(model, mixture).items():
            found[f"vectors/{task}{name}"] = vector[first:last]
    if mixture.router_weight is not None and mixture.router_bias is not None:
        found |= {"router/weight": mixture.router_weight, "router/bias": mixture.router_bias}
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in sorted(found.items())}


def _entries(model: nn.Module, mixture: Mixture) -> dict[str, tuple[int, int]]:
    """Where the parts of a vector are: one for each layer, or one for all."""
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, GateLayer)}
    assert mixture.embedding is not None
    if mixture.embedding.per == SHARED:
        return {"": (0, next(iter(layers.values())).rank)}
    return {f"/{name}": (layer.entries, layer.entries + layer.rank) for name, layer in layers.items()}


def _has_head(model: nn.Module, member: str) -> bool:
    return any(isinstance(layer, HeadGate) and member in layer.names for layer in adapter_layers(model).values())


def member_tensors(model: nn.Module, member: str) -> dict[str, Tensor]:
    """The content of one adapter's weights file, under names relative to the model."""
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(model).items():
        for key, parameter in layer.peft_parameters().items():
            own, _, rest = key.partition(".")
            if own == member:
                found[f"{name}.{rest}"] = parameter.detach().float().cpu().contiguous().clone()
    return dict(sorted(found.items()))


def member_config(model: nn.Module, member: str) -> dict[str, object]:
    """The content of one adapter's `adapter_config.json`; the base is what the whole attachment says."""
    attachment = need_attachment(model)
    layers = adapter_layers(model)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for name, layer in layers.items():
        if isinstance(layer, GateLayer) and member in layer.names:
            place = layer.names.index(member)
            ranks[name], scales[name] = len(layer.lora_A[place]), layer.member_scales[place]
    whole = attachment.config
    config = attachment.members[member].with_(
        base_model_name_or_path=whole.base_model_name_or_path, revision=whole.revision
    )
    fields = peft_format.config_to_peft(with_ranks(config, ranks, scales))
    fields["fan_in_fan_out"] = any(isinstance(layers[name].base, Conv1D) for name in ranks)
    if config.task_type is None:
        fields["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return fields


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], scales: Mapping[str, float]) -> LoraConfig:
    """`config` as plain LoRA of these ranks and scales: its own patterns where they say so, else one for each layer."""
    config = config.with_(init_lora_weights=True, use_dora=False)
    read = config.with_(
        rank_pattern=dict(
            sorted(config.rank_pattern.items())
        ),  # the file sorts its keys, and the first that fits holds
        alpha_pattern=dict(sorted(config.alpha_pattern.items())),
    )
    found = {name: (rank_in(read, name), alpha_in(read, name)) for name in ranks}
    if all(
        rank == ranks[name] and scale_of(alpha, rank, config.use_rslora) == scales[name]
        for name, (rank, alpha) in found.items()
    ):
        return config
    alphas = {name: _alpha(scales[name], rank, config.use_rslora) for name, rank in ranks.items()}
    first = max(ranks, key=lambda name: ranks[name])
    return config.with_(
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[first]},
    )


def _alpha(scale: float, rank: int, use_rslora: bool) -> int | float:
    alpha = scale * (rank**0.5 if use_rslora else rank)
    nearest = round(alpha)
    return nearest if nearest and abs(alpha - nearest) <= 1e-12 * alpha else alpha


# --- reading ---------------------------------------------------------------------------------------------------------


def load_gate(model: Model, folder: Path_, trainable: bool = False) -> Model:
    """Attaches the gate or task embedding in `folder`, in place of whatever adapter is attached.

    Raises: RequestError, with the model as it was, when the folder does not fit itself or the model, or is known to be
        of another base. Where nothing is known nothing is said: `attach_gate` has said it.
    """
    spec, tables, head = read_gate_folder(folder), read_tables(folder), read_head(folder)
    check_bases({name: Path(folder) / name for name in spec.adapters}, lambda: model_weight_hashes(model), silent)
    if attachment_of(model) is not None:
        need_active(model, "load an adapter")
    with unchanged_on_error(model):
        if attachment_of(model) is not None:
            detach(model)
        parts = {name: taken_out(model, Path(folder) / name, name) for name in spec.adapters}
        own = {name: part for name, part in parts.items() if spec.adapters[name] is not None}
        common = {name: part for name, part in parts.items() if spec.adapters[name] is None}
        assemble(model, own, common, spec.settings, spec.tasks)
        _take_tables(model, spec, tables, str(folder))
        need_attachment(model).head = head
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(trainable)
    return model


@torch.no_grad()
def _take_tables(model: nn.Module, spec: GateFolder, tables: Mapping[str, Tensor], where: str) -> None:
    mixture = mixture_of(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in tables_of(model).items()}
    if spec.router is not None:
        wanted |= {"router/weight": (len(spec.tasks), _width(tables)), "router/bias": (len(spec.tasks),)}
    check_tables(where, wanted, tables)
    if mixture.logits is not None:
        mixture.logits.copy_(torch.stack([tables[f"logits/{name}"] for name in mixture.groups]))
    for task, vector in zip(mixture.tasks, mixture.vectors, strict=False):
        for name, (first, last) in _entries(model, mixture).items():
            vector[first:last] = tables[f"vectors/{task}{name}"].to(vector.device)
    if spec.router is not None:
        set_router(model, tables["router/weight"], tables["router/bias"], spec.router)


def _width(tables: Mapping[str, Tensor]) -> int:
    weight = tables.get("router/weight")
    return weight.shape[-1] if weight is not None and weight.dim() == 2 else 0


def set_router(model: nn.Module, weight: Tensor, bias: Tensor, report: Mapping[str, Any]) -> None:
    """Gives an inferred gate its classifier: logits of the tasks = weight h + bias, h as in `pooled_states`.

    Raises: RequestError for a gate of another mode, or shapes that don't fit the tasks.
    """
    mixture = mixture_of(model)
    if mixture.gate is None or mixture.gate.mode != "inferred":
        raise RequestError("only a gate of mode 'inferred' has a classifier")
    if weight.shape[0] != len(mixture.tasks) or tuple(bias.shape) != (len(mixture.tasks),):
        raise RequestError(
            f"the classifier has shapes {list(weight.shape)} and {list(bias.shape)}, for {len(mixture.tasks)} tasks"
        )
    device = next(model.parameters()).device
    mixture.router_weight, mixture.router_bias = weight.detach().float().to(device), bias.detach().float().to(device)
    mixture.router_report = dict(report)
