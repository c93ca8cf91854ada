"""What the user points at: a run folder, an adapter folder, a model folder, or a model's name; and how to load it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankwise import distributed
from rankwise.adapters.gate_config import INFERRED, LEARNED
from rankwise.attach.checkpoint import load_adapter, read_config
from rankwise.attach.gate_folder import GateFolder, is_gate_folder, read_gate_folder
from rankwise.attach.gates import set_task
from rankwise.attach.peft_format import CONFIG_FILE
from rankwise.attach.targets import HEADS
from rankwise.data.config import AUTO, DataConfig
from rankwise.data.formats import TEXT
from rankwise.errors import RequestError, did_you_mean
from rankwise.export.onnx_folder import is_onnx_folder
from rankwise.models.config import ModelConfig
from rankwise.models.heads import set_padding
from rankwise.models.labels import MULTI, Head, Labels
from rankwise.models.load import check_task, choose_device, is_encoder, load_config, load_model, load_tokenizer
from rankwise.models.quiet import quietly
from rankwise.recipes.heads import num_labels_saved, saved_head
from rankwise.recipes.output import RUN_FILE
from rankwise.recipes.processes import bring_in_step, num_shares
from rankwise.recipes.run import read_run
from rankwise.train.config import TrainConfig
from rankwise.train.needs import NEEDS, Needs
from rankwise.train.precision import choose_precision
from rankwise.train.state import ADAPTER, CHECKPOINTS

MODEL_FILE = "config.json"
TAGGER = "token-classification"
TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Target:
    """Something that answers: a base model, and an adapter on it or not.

    Args:
        name: as the user wrote it.
        kind: `run`, `adapter` or `model`.
        model: the base.
        adapter: the adapter's folder; None for a model.
        data: the run's data section; None where no run is known.
        chat_template: replaces the run's, or the default; None does not.
    """

    name: str
    kind: str
    model: ModelConfig
    adapter: Path | None = None
    data: DataConfig | None = None
    chat_template: str | None = None
    train: TrainConfig | None = None
    """How the run trained; None where no run is known."""
    task_type: str | None = None
    """Of a lone adapter, by its configuration."""
    gate: GateFolder | None = None
    """Of several adapters under a gate, or of task embeddings; None for one adapter."""
    task: str | None = None
    """The task that was asked for, of a gate's."""
    task_files: Mapping[str, str | list[str]] = field(default_factory=dict)
    """The valid files of the run's tasks, where they have some."""

    @cached_property
    def objective(self) -> str:
        """What it was trained for, else what its task type or the kind of its model is for: a key of `NEEDS`.

        Raises: RequestError when the model's configuration has to be read and can't be.
        """
        if self.train is not None:
            return self.train.objective
        for name, needs in NEEDS.items():
            if needs.task_type == self.task_type:
                return name
        config = load_config(self.model)
        for ending, name in (("ForSequenceClassification", "classification"), ("ForTokenClassification", TAGGER)):
            if any(architecture.endswith(ending) for architecture in config.architectures or ()):
                return name
        if is_encoder(config):
            return "embedding"
        return "seq2seq" if config.is_encoder_decoder else "sft"

    @property
    def needs(self) -> Needs:
        """What the objective needs of the model and of rows."""
        return NEEDS[self.objective]

    def data_config(self, file: str | list[str] | None = None) -> DataConfig:
        """How rows (of `file`) become tokens: the run's own treatment, or the defaults, padded."""
        config = DataConfig(train="prompts", packing=False) if self.data is None else self.data
        if file is not None:
            format = AUTO if config.format == TEXT else config.format  # a run on texts may be asked questions
            config = config.for_files(file, format)
        return config if self.chat_template is None else dataclasses.replace(config, chat_template=self.chat_template)


@dataclass(frozen=True)
class Opened:
    """A target in memory: the model in evaluation mode, its adapter attached, and its tokenizer."""

    target: Target
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: str


def find_target(
    name: str,
    base: str | None = None,
    device: str = "auto",
    chat_template: str | None = None,
    task: str | None = None,
) -> Target:
    """What `name` is. `base` replaces the model that an adapter says it belongs to, `chat_template` the run's; `task`
    is one of a gate's.

    Raises: RequestError for a path that is not there, a folder that is none of these, an adapter without a base, or a
        task that it does not have.
    """
    target = _found(name, base, device)
    if task is not None and target.gate is None:
        raise RequestError(
            f"--task {task} has no effect: '{name}' holds one adapter or none, and no tasks; leave it out"
        )
    if task is not None and target.gate is not None and task not in target.gate.tasks:
        raise RequestError(f"'{name}' has no task '{task}'{did_you_mean(task, target.gate.tasks)}")
    return dataclasses.replace(target, chat_template=chat_template or target.chat_template, task=task)


def need_task(target: Target) -> None:
    """Raises: RequestError for a gate that takes no part in anything before a task is chosen, where none was."""
    gate = target.gate
    if gate is None or target.task is not None or (gate.gate is not None and gate.gate.mode in (INFERRED, *LEARNED)):
        return
    kind = "a hard gate" if gate.gate is not None else "a set of task embeddings"
    raise RequestError(f"'{target.name}' is {kind}: say by --task which of {', '.join(gate.tasks)} it is about")


def _found(name: str, base: str | None, device: str) -> Target:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise RequestError(f"'{name}' is a file; give its folder '{folder.parent}', or a model's name")
    if not folder.is_dir():
        if base is not None:
            raise RequestError(f"there is no adapter folder '{name}', so --base {base} has no effect")
        _check_name(name)
        return Target(name, "model", ModelConfig(name, device))
    if (folder / RUN_FILE).is_file():
        return _run_target(name, folder, base, device)
    if (folder / CONFIG_FILE).is_file() or is_gate_folder(folder):
        return _adapter_target(name, folder, base, device)
    if is_onnx_folder(folder):
        raise RequestError(
            f"'{name}' is an ONNX export, which `rankwise generate` and `rankwise chat` run; give the run or adapter "
            "that it was made from"
        )
    if (folder / MODEL_FILE).is_file():
        if base is not None:
            raise RequestError(f"'{name}' is a model, not an adapter, so --base {base} has no effect")
        return Target(name, "model", ModelConfig(str(folder), device))
    inside = sorted(entry.name for entry in folder.iterdir())
    raise RequestError(
        f"'{name}' is no run ({RUN_FILE}), adapter ({CONFIG_FILE}) or model ({MODEL_FILE}); it holds "
        + (", ".join(inside[:6]) or "nothing")
    )


def find_adapter(name: str, base: str | None = None, device: str = "auto") -> Target:
    """As `find_target`, where only a run or an adapter will do, and that only one.

    Raises: RequestError for anything else.
    """
    target = find_adapters(name, base, device)
    if target.gate is not None:
        raise RequestError(
            f"'{name}' holds several adapters ({', '.join(target.gate.adapters)}) under a gate: fold them into one by "
            f"`rankwise fold {name} --out DIR` first, or give the folder of one"
        )
    return target


def find_adapters(name: str, base: str | None = None, device: str = "auto", task: str | None = None) -> Target:
    """As `find_adapter`; several adapters under a gate will do too.

    Raises: RequestError for anything else.
    """
    if not Path(name).expanduser().exists():
        raise RequestError(f"there is no run or adapter folder '{name}'{_near(Path(name).expanduser())}")
    target = find_target(name, base, device, task=task)
    if target.adapter is None:
        raise RequestError(f"'{name}' is a model without an adapter; give a run folder or an adapter folder")
    return target


def adapter_folder(name: str) -> Path:
    """The adapter in a run folder, or the folder itself; for those who need its files and no base.

    Raises: RequestError for a folder that is not there, a run without an adapter yet, and several adapters under a
        gate.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        raise RequestError(f"there is no run or adapter folder '{name}'{_near(folder)}")
    if (folder / RUN_FILE).is_file():
        _need_adapter(name, folder)
        folder = folder / ADAPTER
    if is_gate_folder(folder):
        raise RequestError(
            f"'{name}' holds several adapters under a gate: fold them into one by `rankwise fold {name} --out DIR` "
            "first, or give the folder of one"
        )
    return folder


def _check_name(name: str) -> None:
    """A name that can only be a path must be there; whether a Hub id exists shows when it is loaded."""
    path = Path(name).expanduser()
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise RequestError(f"there is no folder '{name}'{_near(path)}")
    if path.parent.is_dir() and "/" in name:
        raise RequestError(f"there is no folder '{name}'{_near(path)}")


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor is there '{path.parent}'"
    return did_you_mean(path.name, sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()))


def _run_target(name: str, folder: Path, base: str | None, device: str) -> Target:
    _need_adapter(name, folder)
    return _with_run(name, "run", folder / RUN_FILE, folder / ADAPTER, base, device)


def _need_adapter(name: str, run: Path) -> None:
    if not (run / ADAPTER / CONFIG_FILE).is_file() and not is_gate_folder(run / ADAPTER):
        raise RequestError(
            f"the run '{name}' has no adapter yet; finish it with `rankwise train {run / RUN_FILE} --resume`"
        )


def _with_run(name: str, kind: str, run_file: Path, adapter: Path, base: str | None, device: str) -> Target:
    """An adapter with the base and the data treatment of the run that it is of."""
    run = read_run(run_file)
    model = dataclasses.replace(run.model, device=device) if base is None else ModelConfig(base, device)
    own = {task: files.valid for task, files in run.tasks.files.items() if files.valid is not None}
    return Target(name, kind, model, adapter, run.data, train=run.train, gate=_gate(adapter), task_files=own)


def _gate(folder: Path) -> GateFolder | None:
    return read_gate_folder(folder) if is_gate_folder(folder) else None


def _run_file_above(adapter: Path) -> Path | None:
    """The run file of the run whose result, or a checkpoint of which, an adapter's folder is."""
    adapter = adapter.parent if is_gate_folder(adapter.parent) else adapter  # one of several
    above = adapter.absolute().parents
    if adapter.absolute().name != ADAPTER:
        return None
    run = above[2] if len(above) > 2 and above[1].name == CHECKPOINTS else above[0]
    return run / RUN_FILE if (run / RUN_FILE).is_file() else None


def _adapter_target(name: str, folder: Path, base: str | None, device: str) -> Target:
    """An adapter folder; inside a run's folder, its checkpoints' too, it has the run's base and data treatment."""
    if (run_file := _run_file_above(folder)) is not None:
        return _with_run(name, "adapter", run_file, folder, base, device)
    gate = _gate(folder)
    config = read_config(folder if gate is None else folder / next(iter(gate.adapters)))
    if base is not None:
        return Target(name, "adapter", ModelConfig(base, device), folder, task_type=config.task_type, gate=gate)
    stated = config.base_model_name_or_path
    if not stated:
        raise RequestError(f"the adapter '{name}' does not name its base model; give it with --base")
    if stated.startswith(os.sep) and not Path(stated).is_dir():
        raise RequestError(f"the base model of '{name}' is not at '{stated}' any more; give it with --base")
    is_folder = Path(stated).expanduser().is_dir()  # which has no revision, whatever the adapter's writer put there
    model = ModelConfig(stated, device, None if is_folder else config.revision)
    return Target(name, "adapter", model, folder, task_type=config.task_type, gate=gate)


def open_target(target: Target, precision: str = "auto", sharding: str = "none") -> Opened:
    """Loads the model in `precision` (fp32, bf16, auto), attaches the adapter, and finds the tokenizer.

    Of several processes each loads it, and they make sure that it is the same; with `sharding` each keeps its
    share of the base.

    Raises: RequestError for what can't be loaded or spread.
    """
    device = choose_device(target.model.device)
    # one probe for several processes: they may find differently
    chosen = distributed.from_first(lambda: choose_precision(precision, device))
    shares = num_shares(sharding)
    if shares > 1:
        target = dataclasses.replace(target, model=dataclasses.replace(target.model, device="cpu"))
    with distributed.together():
        opened = open_in(target, chosen.dtype, chosen.name)
    bring_in_step(opened.model, shares, device)
    return opened


def open_in(target: Target, dtype: torch.dtype, precision: str) -> Opened:
    """As `open_target`, in a dtype that has been chosen; `precision` is its name."""
    tokenizer = target_tokenizer(target)
    head = target_head(target)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a base's untrained head: the same each time
        labels = head.labels if head is not None and target.adapter is not None else None
        model = load_model(target.model, dtype, target.needs.task, labels)
    if target.needs.task_type in HEADS:
        assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer gives every tokenizer a pad token"
        set_padding(model, tokenizer.pad_token_id)
    if target.adapter is not None:
        load_adapter(model, target.adapter)
        model.eval()
    if target.task is not None:
        set_task(model, target.task)
    return Opened(target, model, tokenizer, precision)


def target_head(target: Target) -> Head | None:
    """What the target's labels are, or how its vectors are pooled: by `head.json`, else by what its files allow.

    A classifier without names has the labels 0, 1, and so on. None where there is no head.

    Raises: RequestError for files that can't be read.
    """
    if target.adapter is not None:
        head = saved_head(target.adapter)
        if head is not None or target.needs.task_type not in HEADS:
            return head
        return Head(labels=Labels(tuple(str(index) for index in range(num_labels_saved(target.adapter)))))
    if target.needs.task_type not in HEADS:
        return None
    config = load_config(target.model)
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    names = [name.removeprefix("LABEL_") if re.fullmatch(r"LABEL_\d+", name) else name for name in names]
    return Head(labels=Labels(tuple(names), config.problem_type == MULTI))


def target_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """The tokenizer in the adapter's folder, where there is one (an adapter may change the vocabulary or the chat
    template), else the base's. Always with a pad token.

    Raises: RequestError for what can't be loaded, and for an encoder.
    """
    check_task(target.model, target.needs.task)
    if target.adapter is None or not (target.adapter / TOKENIZER_FILE).is_file():
        return load_tokenizer(target.model)
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(target.adapter)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"the tokenizer in '{target.adapter}' cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = load_tokenizer(target.model).pad_token
    return tokenizer
