"""A fine-tuning run that is ready to start: everything read, loaded and checked, nothing written yet."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise import distributed
from rankwise.adapters.config import LoraConfig
from rankwise.adapters.layers import layer_kind
from rankwise.attach.attachment import need_attachment
from rankwise.attach.checkpoint import load_adapter, read_config
from rankwise.attach.inject import (
    adapter_layers,
    adapter_parameters,
    adapter_tensors,
    attach,
    disabled,
    output_factors,
    ranks,
)
from rankwise.attach.swiglu import fuse_mlps
from rankwise.attach.targets import HEADS
from rankwise.data.config import BY_HASH
from rankwise.data.formats import TEXT
from rankwise.errors import RequestError
from rankwise.models.heads import set_padding
from rankwise.models.load import check_task, choose_device, load_model, resolve
from rankwise.recipes.finetune_data import RunData, load_data
from rankwise.recipes.finetune_report import describe_run
from rankwise.recipes.heads import head_of, with_new_modules
from rankwise.recipes.measured_ranks import choose, with_measured_plan
from rankwise.recipes.moving_ranks import RankMover, check_same_moves, starting_config
from rankwise.recipes.processes import bring_in_step, check_same_data, check_spread, is_state_shared, num_shares
from rankwise.recipes.provenance import data_hashes, provenance
from rankwise.recipes.rank_movers import rank_mover
from rankwise.recipes.resume import as_begun, check_length, check_settings, run_precision, training_settings
from rankwise.recipes.run import RunConfig, StartFrom, check_task_type, with_section
from rankwise.recipes.run_tasks import extended_folder, several_adapters
from rankwise.recipes.task_extend import attach_extended, check_extended
from rankwise.recipes.task_run import check_same_stages
from rankwise.recipes.task_setup import begin_tasks, rehearse, tasks_of_run
from rankwise.recipes.task_stages import TaskStages
from rankwise.say import Say
from rankwise.train.batches import MicroBatches
from rankwise.train.config import AUTO, TrainConfig
from rankwise.train.loop import LoopPlan, Progress
from rankwise.train.objective import Objective
from rankwise.train.objectives import objective_of
from rankwise.train.optim import learning_rate
from rankwise.train.optimizers import make_optimizer
from rankwise.train.order import RowOrder
from rankwise.train.precision import Precision
from rankwise.train.preference import StartingAdapter
from rankwise.train.recompute import enable_gradient_checkpointing
from rankwise.train.rng import process_seed, seed_everything
from rankwise.train.scale import LossScale
from rankwise.train.shares import share_state
from rankwise.train.state import Checkpoint, restore
from rankwise.train.statistics import norms
from rankwise.train.task_order import TaskOrder
from rankwise.train.tasked import for_tasks


@dataclass
class Job:
    """All parts of a run, introduced to each other."""

    run: RunConfig
    """Resolved: the precision and the device are those that are used."""
    model: PreTrainedModel
    data: RunData
    batches: MicroBatches
    objective: Objective
    plan: LoopPlan
    optimizer: torch.optim.Optimizer
    progress: Progress
    settings: dict[str, Any]
    provenance: dict[str, Any]
    checkpoint: Checkpoint | None
    mover: RankMover | None
    """Moves the ranks, where they move."""
    tasks: TaskStages | None = None
    """The tasks and stages, where the run has several tasks."""

    @property
    def resumed_from(self) -> int | None:
        """The step that it goes on after."""
        return self.checkpoint.step if self.checkpoint is not None else None


def prepare(run: RunConfig, checkpoint: Checkpoint | None, say: Say) -> Job:
    """Reads the data, loads and attaches the model, and checks that a batch goes through. Writes nothing.

    Of several processes each reads and loads everything, and they make sure that it is the same.

    Raises: RequestError for anything wrong with the request; with a checkpoint, also when its settings differ.
    """
    with distributed.together():
        check_extended(run)
        device = choose_device(run.model.device)
        check_task(run.model, run.train.needs.task)
        check_spread(objective_of(run.train), run.train.objective, run.train.sharding)
        data = load_data(run, say)
        hashes = data_hashes(run.data)
        least = _least_precision(run)
    check_same_data(hashes)
    # one probe for all: they may find differently
    precision = distributed.from_first(lambda: run_precision(least, device, checkpoint))
    run = _resolved(run, data, device, precision, checkpoint)
    num_rows = data.rows_per_epoch
    settings = training_settings(run, hashes)
    if checkpoint is not None:
        _check_goes_on(checkpoint, run, settings, num_rows, say)
    plan = _plan(run, num_rows)
    model = _model_in_step(run, precision, data, device, say, checkpoint is not None)
    run = with_measured_plan(run, ranks(model))
    settings["ranks.plan"] = run.ranks.plan
    tasks = tasks_of_run(run, model, data, say)
    goes_on = isinstance(run.adapter, StartFrom) and run.train.objective == "dpo"
    if run.train.statistics:
        plan = dataclasses.replace(plan, measure=lambda: norms(adapter_parameters(model)))
    objective = objective_of(run.train, StartingAdapter(model).in_place if goes_on else disabled)
    batches = _batches(objective, run, data, tasks, device)
    if tasks is not None:
        rehearse(model, objective, batches)  # what is found out about a model, on the plain adapter
        objective = for_tasks(objective, data.tasks, tasks.route)
        batches = _batches(objective, run, data, tasks, device)
        begin_tasks(tasks, run, batches, data, checkpoint)
        plan = tasks.run.plan(plan)
    mover = rank_mover(run, model, num_rows)
    if mover is not None and checkpoint is not None:
        mover.restore(checkpoint.progress)
    optimizer = optimizer_of(run.train, model)
    if mover is not None:
        mover.watch(optimizer)
    if is_state_shared(run.train, adapter_parameters(model)):
        share_state(optimizer)
    start = Path(run.adapter.folder) if isinstance(run.adapter, StartFrom) else None
    if run.tasks.extend is not None:
        start = extended_folder(run.tasks.extend)
    record = distributed.from_first(
        lambda: provenance(model, run.model.revision, hashes, start, checkpoint.step if checkpoint else None)
    )
    progress = Progress(scale=LossScale.of(precision.name))
    job = Job(
        run, model, data, batches, objective, plan, optimizer, progress, settings, record, checkpoint, mover, tasks
    )
    if tasks is None:
        rehearse(model, objective, batches)
    seed_everything(process_seed(run.train.seed, distributed.rank()))
    if checkpoint is not None:
        restore(checkpoint, model, optimizer, run.train.seed)
        job.progress = copy.deepcopy(checkpoint.progress)
        distributed.check_in_step(adapter_tensors(model), f"going on after step {checkpoint.step}")
    for line in describe_run(run, precision, model, data, plan):
        say(line)
    return job


def _resolved(
    run: RunConfig, data: RunData, device: torch.device, precision: Precision, checkpoint: Checkpoint | None
) -> RunConfig:
    """The run with what was found in place of `auto`, so that its file repeats it."""
    if data.train.format == TEXT:  # recognised or not: then `generate` on the run's folder goes on with texts
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, format=TEXT))
    if run.data.valid is None:  # resolved to a number: the same rows are held out when the run is repeated
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, **_resolved_split(run, data)))
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, device=str(device) if distributed.world_size() == 1 else device.type),
        train=dataclasses.replace(run.train, precision=precision.name),
    )
    if checkpoint is not None and run.ranks.plan is None and (plan := checkpoint.settings.get("ranks.plan")):
        run = with_measured_plan(run, plan)
    return run


def _check_goes_on(
    checkpoint: Checkpoint, run: RunConfig, settings: Mapping[str, Any], num_rows: int, say: Say
) -> None:
    """Raises: RequestError when the run is not the checkpoint's."""
    check_settings(checkpoint, settings, say)
    check_length(checkpoint, run.train, num_rows)
    begun = as_begun(checkpoint, run.train)
    check_same_stages(run, begun)
    check_same_moves(run, begun, num_rows, checkpoint.step)


def _batches(
    objective: Objective, run: RunConfig, data: RunData, tasks: TaskStages | None, device: torch.device
) -> MicroBatches:
    """The micro batches of the run's steps, by the rows' order or by the tasks'."""
    train = run.train
    order: RowOrder | TaskOrder = (
        RowOrder(data.shares, train.batch_size, train.num_rows(data.rows_per_epoch), train.seed)
        if tasks is None
        else tasks.run.order
    )
    packing = run.data.packing is True
    return MicroBatches(objective, data.training_examples, order, train.micro_rows, data.pad_id, packing, device)


def _resolved_split(run: RunConfig, data: RunData) -> dict[str, Any]:
    """`data.valid_split` as what it came to, and `data.split_by` where that has an effect."""
    if not data.num_held_out:
        return {"valid_split": 0, "split_by": BY_HASH}
    return {"valid_split": data.num_held_out if run.data.valid_split == AUTO else run.data.valid_split}


def _least_precision(run: RunConfig) -> str:
    """`train.precision`, or fp32 for `auto` where weights of the base are trained: Adam's steps vanish in bf16 weights.

    A classifier's head is no such case: it is fp32 on any base (see `rankwise.attach.wide`).

    Raises: RequestError when bf16 was asked for with such an adapter.
    """
    config = read_config(run.adapter.folder) if isinstance(run.adapter, StartFrom) else run.adapter
    whole = None if run.train.needs.task_type in HEADS else config.modules_to_save
    named = {"modules_to_save": whole, "bias": None if config.bias == "none" else config.bias}
    trained = [f"adapter.{name} ({value})" for name, value in named.items() if value]
    if not trained or run.train.precision == "fp32":
        return run.train.precision
    if run.train.precision == AUTO:
        return "fp32"
    raise RequestError(
        f"{trained[0]} trains weights of the base, which need fp32: small steps are lost in {run.train.precision}; "
        "set train.precision=fp32"
    )


def _plan(run: RunConfig, num_rows: int) -> LoopPlan:
    train = run.train
    num_steps = train.num_steps(num_rows)
    warmup = train.warmup_steps(num_steps)

    def rate(step: int) -> float:
        return learning_rate(step, num_steps, train.lr, train.schedule, warmup, train.lr_floor)

    return LoopPlan(num_steps, rate, train.max_grad_norm, train.early_stopping)


def loop_plan(run: RunConfig, data: RunData) -> LoopPlan:
    """The steps of a run on these rows, and their rates."""
    return _plan(run, data.rows_per_epoch)


def optimizer_of(train: TrainConfig, model: PreTrainedModel) -> torch.optim.Optimizer:
    """A new optimizer over everything that is trained. Raises: RequestError for an LoRA+ ratio without effect."""
    faster = output_factors(model) if train.loraplus_ratio != 1.0 else set[str]()
    if train.loraplus_ratio != 1.0 and not faster:
        raise RequestError(
            f"train.loraplus_ratio ({train.loraplus_ratio:g}) has no effect: no adapted layer has a B that it is for "
            "(embeddings have none); set it to 1"
        )
    trained = {name: parameter for name, parameter in adapter_parameters(model).items() if parameter.requires_grad}
    return make_optimizer(
        trained, train.lr, train.betas, train.weight_decay, train.optimizer, faster,
        train.loraplus_ratio,
    )  # fmt: skip


def _model_in_step(
    run: RunConfig, precision: Precision, data: RunData, device: torch.device, say: Say, goes_on: bool
) -> PreTrainedModel:
    """The attached model, the same on all processes, each with its share of the base where that is spread."""
    shares = num_shares(run.train.sharding)
    # what is to be cut is loaded into the CPU's memory, where the processes of a machine share the file's pages
    loaded = run if shares == 1 else dataclasses.replace(run, model=dataclasses.replace(run.model, device="cpu"))
    with distributed.together():
        model = _attached_model(loaded, precision, data, say, goes_on)
    bring_in_step(model, shares, device)
    return model


def _attached_model(run: RunConfig, precision: Precision, data: RunData, say: Say, goes_on: bool) -> PreTrainedModel:
    seed_everything(run.train.seed)  # a new head is drawn while loading
    model = load_model(run.model, precision.dtype, run.train.needs.task, data.labels)
    if run.train.needs.task_type in HEADS:
        set_padding(model, data.pad_id)
    data.check_fits(model)
    seed_everything(run.train.seed)
    if isinstance(run.adapter, StartFrom):
        task_type = read_config(run.adapter.folder).task_type
        check_task_type(task_type, f"task_type of '{run.adapter.folder}'", run.train.objective)
        if run.tasks.extend is None:
            load_adapter(model, run.adapter.folder, trainable=True)
        else:
            attach_extended(model, run, say)
        attachment = need_attachment(model)  # the result is of the model that it is trained on now
        attachment.config = attachment.config.with_(
            base_model_name_or_path=_base_name(run), revision=run.model.revision
        )
    else:
        named = run.adapter.base_model_name_or_path or _base_name(run)
        task_type = run.adapter.task_type or run.train.needs.task_type
        config = run.adapter.with_(base_model_name_or_path=named, revision=run.model.revision, task_type=task_type)
        try:
            config = starting_config(with_new_modules(model, config), run.ranks)
            chosen = choose(model, config, run, data, say, goes_on)
            attach(model, chosen.config, directions=chosen.directions)
        except RequestError as error:
            raise RequestError(with_section(str(error))) from error
        _check_dropout(model, run.adapter)
    if run.train.fused_mlp and not several_adapters(run.tasks):
        fuse_mlps(model, required=run.train.fused_mlp is True)
    head = head_of(run.train, data.labels)
    need_attachment(model).head = None if head is None else head.to_dict()
    if run.train.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _check_dropout(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raises: RequestError for a dropout that no adapted layer can apply: embeddings take ids."""
    kinds = [layer_kind(layer.base) for layer in adapter_layers(model).values()]
    if config.lora_dropout and not any(kind is not None and kind.drops_input for kind in kinds):
        raise RequestError(
            f"adapter.lora_dropout ({config.lora_dropout}) has no effect: only embeddings are adapted, and token ids "
            "can't be dropped; set it to 0"
        )


def _base_name(run: RunConfig) -> str:
    """What others load the base by (PEFT's AutoPeftModel, vLLM): its folder, or its id on the Hub."""
    source = resolve(run.model.name)
    return str(Path(source).absolute()) if Path(source).is_dir() else source
