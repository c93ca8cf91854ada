"""What a run says before it trains: the model, what of it is trained, the data, the plan."""

from __future__ import annotations

import math
from collections import Counter

from transformers import PreTrainedModel

from rankwise.adapters.layers import layer_kind
from rankwise.attach.checkpoint import read_config
from rankwise.attach.inject import adapter_layers, describe, ranks
from rankwise.data.config import BY_HASH, BY_ROW
from rankwise.data.loaded import leak_warning
from rankwise.data.overlap import near_warnings
from rankwise.errors import counted
from rankwise.quantized import storage_in
from rankwise.recipes.finetune_data import RunData
from rankwise.recipes.run import RunConfig, StartFrom
from rankwise.tasks.config import BEHIND
from rankwise.tasks.sampling import shares_of
from rankwise.train.loop import LoopPlan
from rankwise.train.precision import Precision

LEFT_OUT_WORTH_SAYING = 0.01
SHOWN_LABELS = 12
BITS_PER_PARAMETER = 2


def describe_run(
    run: RunConfig, precision: Precision, model: PreTrainedModel, data: RunData, plan: LoopPlan
) -> list[str]:
    """Lines for people, one subject each."""
    return [
        f"model     {run.model.name} ({type(model).__name__}) on {model.device}, {precision.name}: {precision.why}"
        + (f"; its layers are stored in {storage}" if (storage := storage_in(model)) else ""),
        *_adapter_lines(run, model),
        *_capacity_lines(run, model, data),
        *_data_lines(run, data),
        *_training_lines(run, data, plan),
    ]


def _adapter_lines(run: RunConfig, model: PreTrainedModel) -> list[str]:
    found = describe(model)
    counts = Counter(ranks(model).values())
    rank_text = ", ".join(
        f"rank {rank}" + (f" ({counted(count, 'layer')})" if len(counts) > 1 else "")
        for rank, count in sorted(counts.items())
    )
    where = ""
    if isinstance(run.adapter, StartFrom):
        where = f", from '{run.adapter.folder}' (made for {read_config(run.adapter.folder).base_model_name_or_path})"
    if run.tasks.extend is not None:
        return [
            f"adapter   {counted(found['layers'], 'layer')}, {rank_text}: {found['parameters']:,} parameters, of which "
            f"the vectors of {', '.join(run.tasks.names)} are trained{where}"
        ]
    lines = [
        f"adapter   {counted(found['layers'], 'layer')}, {rank_text}: {found['parameters']:,} trainable parameters, "
        f"{found['share_of_model']:.2%} of all{where}"
    ]
    if found["share_left_out"] > LEFT_OUT_WORTH_SAYING:
        names = ", ".join(found["largest_left_out"])
        lines.append(f"          left out: {found['share_left_out']:.0%} of the layers' weights ({names})")
    return lines + _too_high_ranks(run, model)


def _capacity_lines(run: RunConfig, model: PreTrainedModel, data: RunData) -> list[str]:
    """A hint where the data bring more than the adapter can hold: about a bit a trained token, two a parameter.

    Allen-Zhu and Li 2024, "Physics of language models: part 3.3, knowledge capacity scaling laws" (arXiv 2404.05405).
    """
    parameters, (_, trained) = describe(model)["parameters"], data.tokens_per_epoch
    if run.train.needs.unit != "token" or BITS_PER_PARAMETER * parameters >= trained:
        return []
    return [
        f"          hint: an epoch trains on {trained:,} tokens, more than {parameters:,} parameters can remember: a "
        "higher rank may help; see docs/ranks.md"
    ]


def _too_high_ranks(run: RunConfig, model: PreTrainedModel) -> list[str]:
    """A warning about layers whose rank is above the smaller side of their weight, which no matrix of it can reach."""
    found: Counter[str] = Counter()
    for name, layer in adapter_layers(model).items():
        kind = layer_kind(layer.base)
        if not layer.rank or kind is None:
            continue
        (_, *inputs), (num_outputs, *_) = kind.factor_shapes(layer.base, layer.rank)
        if layer.rank > (side := min(math.prod(inputs), num_outputs)):
            found[f"{name.rpartition('.')[2]} (rank {layer.rank}, smaller side {side})"] += 1
    if not found:
        return []
    remedy = "lower adapter.r, or give them ranks of their own in adapter.rank_pattern"
    if isinstance(run.adapter, StartFrom):
        remedy = "a new adapter may do as well with a lower adapter.r"
    return [
        f"          warning: the rank of {counted(found.total(), 'layer')} is above what its weight can have, and only "
        f"adds parameters: {', '.join(found)}; {remedy}"
    ]


def _data_lines(run: RunConfig, data: RunData) -> list[str]:
    tokens, trained = data.tokens_per_epoch
    loaded, unit = data.train, run.train.needs.unit
    what = (
        f"{trained:,} ({trained / tokens:.0%}) trained on" if unit == "token" else f"{counted(trained, unit)} to learn"
    )
    lines = [
        f"data      {counted(len(loaded.examples), 'row')} ({loaded.format}), {tokens:,} tokens an epoch, {what}",
        *_label_lines(data),
        *_mix_lines(run, data),
        *_split_lines(run, data),
    ]
    for split, part in (("train", loaded), ("valid", data.valid)):
        if part is not None:
            how = (part.how,) if part.how else ()
            lines += [f"          {split}: {text}" for text in (*how, *part.notes, *part.warnings)]
    if data.num_leaked:
        lines.append(
            f"          warning: {leak_warning('valid', data.num_leaked)}; the validation loss is too good there"
        )
    if data.overlap is not None:
        found = near_warnings("valid", data.overlap.near_leaks, data.overlap.shared_runs)
        lines += [f"          warning: {text}; see `rankwise data preview`" for text in found]
    return lines


def _label_lines(data: RunData) -> list[str]:
    if data.labels is None:
        return []
    names = data.labels.names
    more = f" and {len(names) - SHOWN_LABELS} more" if len(names) > SHOWN_LABELS else ""
    return [f"          {counted(len(names), 'label')}: {', '.join(names[:SHOWN_LABELS])}{more}"]


def _mix_lines(run: RunConfig, data: RunData) -> list[str]:
    """What an epoch draws from each source, where there are several; of tasks, by what they are drawn."""
    training = data.training
    if len(training.names) == 1:
        return []
    if run.tasks.data:
        sizes = dict(zip(training.names, training.sizes, strict=True))
        shares = shares_of(run.tasks.drawn, sizes)
        first = " at first" if run.tasks.drawn.by == BEHIND else ""
        drawn = [f"{name} {share:.0%} ({counted(sizes[name], 'row')})" for name, share in shares.items()]
        return [f"          tasks, drawn by {run.tasks.drawn.by}{first}: {', '.join(drawn)}"]
    total = sum(training.quotas)
    drawn = [
        f"{name} {quota:,} of {counted(size, 'row')} ({quota / total:.0%})"
        for name, size, quota in zip(training.names, training.sizes, training.quotas, strict=True)
    ]
    return [f"          an epoch draws: {', '.join(drawn)}"]


def _split_lines(run: RunConfig, data: RunData) -> list[str]:
    """What was held out, or that nothing is measured."""
    if data.num_held_out:
        by = {BY_HASH: "by a hash of what they say", BY_ROW: "by chance"}.get(
            run.data.split_by, f"by a hash of their '{run.data.split_by}'"
        )
        return [
            f"          valid: no file given, so {counted(data.num_held_out, 'row')} of the training files "
            f"{'is' if data.num_held_out == 1 else 'are'} held out {by}; data.valid_split=0 trains on all"
        ]
    return [] if data.valid is not None else ["          valid: none, so nothing is measured while training"]


def _training_lines(run: RunConfig, data: RunData, plan: LoopPlan) -> list[str]:
    train, num_rows = run.train, data.rows_per_epoch
    warmup = train.warmup_steps(plan.num_steps)
    lines = [
        f"training  {train.objective}, {counted(plan.num_steps, 'step')} of {counted(train.batch_size, 'row')} "
        f"({train.micro_rows} at a time{', packed' if run.data.packing else ''}), "
        f"{train.num_rows(num_rows) / num_rows:,.2f} epochs; learning rate {train.lr:g}, {train.schedule}"
        + (f", {counted(warmup, 'step')} of warm-up" if warmup else "")
    ]
    chosen = {"optimizer": "adamw", "loraplus_ratio": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
    told = [f"{name} {getattr(train, name)}" for name, usual in chosen.items() if getattr(train, name) != usual]
    if told:
        lines.append(f"          {', '.join(told)}")
    if train.batch_size > num_rows:
        lines.append(
            f"          a step of {train.batch_size} rows takes some of the {counted(num_rows, 'row')} more than once"
        )
    return lines
