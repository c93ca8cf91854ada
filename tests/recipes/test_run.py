from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from rankwise.adapters.config import LoraConfig
from rankwise.data.config import DataConfig
from rankwise.errors import RequestError
from rankwise.recipes.run import SECTIONS, RunConfig, StartFrom, read_run, run_document, run_yaml

RUN_FILE = """
model: {name: demo, device: cpu}
adapter: {kind: lora, r: 16, lora_alpha: 32, target_modules: all-linear, lora_dropout: 0.0}
data: {train: rows/train.jsonl, valid: valid.jsonl, format: auto, max_length: 512, packing: true}
train: {objective: sft, steps: 200, batch_size: 16, micro_batch_size: 4, lr: 2e-4, schedule: cosine, warmup: 0.05,
        precision: auto, seed: 0, log_every: 1, evaluate_every: 50, save_every: 50}
ranks: {policy: fixed}
tasks: {}
output: runs/first
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "run.yaml"
    path.parent.mkdir()
    path.write_text(RUN_FILE)
    return path


def test_a_run_file(run_file: Path) -> None:
    run = read_run(run_file)
    assert run.train.lr == 2e-4 and run.train.steps == 200
    assert isinstance(run.adapter, LoraConfig) and run.adapter.r == 16
    assert run.data.train == str(run_file.parent / "rows/train.jsonl")
    assert run.data.valid == str(run_file.parent / "valid.jsonl")
    assert run.output == str(run_file.parent / "runs/first")
    assert run.model.name == "demo"


def test_overrides_are_yaml_and_their_paths_are_from_here(run_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["train.lr=1e-3", "train.betas=[0.9, 0.95]", "output=out", "data.valid=null"]
    run = read_run(run_file, [*overrides, "train.evaluate_every=null", "train.steps=null", "train.epochs=1.5"])
    assert run.train.lr == 1e-3 and run.train.betas == (0.9, 0.95)
    assert run.data.valid is None and run.train.steps is None and run.train.epochs == 1.5
    assert run.output == str(tmp_path / "out")
    assert run.data.train == str(run_file.parent / "rows/train.jsonl")


def test_a_mapping_is_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = read_run({"data": {"train": ["a.jsonl", "../b.jsonl"]}, "output": "out"})
    assert run.data.train == [str(tmp_path / "a.jsonl"), str(tmp_path.parent / "b.jsonl")]
    assert run.output == str(tmp_path / "out")
    assert run.train.steps == 200


def test_a_run_config_is_taken_as_it_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunConfig(data=DataConfig(train="a.jsonl"), adapter=StartFrom("old"))
    read = read_run(run, ["train.seed=3"])
    assert read.train.seed == 3
    assert read.adapter == StartFrom(str(tmp_path / "old"))


def test_a_model_folder_is_beside_the_run_file_and_a_hub_id_is_not(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for name, expected in {
        "models/tiny": str(tmp_path / "models/tiny"),
        "./gone": str(tmp_path / "gone"),
        "someone/model": "someone/model",
        "demo-encoder": "demo-encoder",
    }.items():
        path = tmp_path / "run.yaml"
        path.write_text(f"model: {{name: {name}}}\ndata: {{train: a.jsonl}}\n")
        assert read_run(path).model.name == expected


def test_a_template_file_is_beside_the_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: a.jsonl, chat_template: mine.jinja}")
    assert read_run(path).data.chat_template == str(tmp_path / "mine.jinja")


def test_the_dump_reads_back_as_the_same_run(run_file: Path, tmp_path: Path) -> None:
    run = read_run(run_file)
    dumped = tmp_path / "elsewhere.yaml"
    dumped.write_text(run_yaml(run))
    assert read_run(dumped) == run
    assert list(yaml.safe_load(run_yaml(run))) == ["model", "adapter", "data", "train", "ranks", "tasks", "output"]


def test_starting_from_an_adapter(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("adapter: {from: old}\ndata: {train: a.jsonl}")
    run = read_run(path)
    assert run.adapter == StartFrom(str(tmp_path / "old"))
    assert run_document(run)["adapter"] == {"from": str(tmp_path / "old")}
    assert read_run(run_document(run)) == run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ("train.lrr", "train.lr")),
        ("lr=1", ("'lr'", "train.lr")),
        ("train.max_length=3", ("train.max_length", "data.max_length")),
        ("outptu=x", ("outptu", "output")),
        ("adapter.rank=3", ("adapter.rank", "adapter.rank_pattern")),
        ("train.lr=fast", ("train.lr", "a number", "fast")),
        ("train.steps=2.5", ("train.steps", "a whole number or null", "2.5")),
        ("train=3", ("train", "mapping", "3")),
        ("adapter.kind=lroa", ("adapter.kind", "lroa", "lora")),
        ("adapter={from: old, r: 8}", ("adapter.r has no effect", "adapter.from")),
        ("adapter.r=0", ("adapter.r must be a positive whole number",)),
        ("adapter.r=x", ("adapter.r must be a whole number, not 'x'",)),
        ("adapter.bias=some", ("unknown adapter.bias 'some'",)),
        ("adapter.init_lora_weights=pisa", ("unknown adapter.init_lora_weights 'pisa'; did you mean 'pissa'",)),
        ("adapter.rank_pattern={q: 0}", ("adapter.rank_pattern['q'] must be",)),
        ("adapter.layers_to_transform=[1]", ("adapter.layers_to_transform has no effect with target_modules",)),
        ("adapter.task_type=SEQ_CLS", ("adapter.task_type (SEQ_CLS)", "train.objective: sft", "CAUSAL_LM")),
        ("adapter.revision=main", ("adapter.revision (main)", "model.revision")),
        ("data={valid: null, valid_split: 0}", ("train.evaluate_every (50)", "no effect", "data.valid")),
        ("train.evaluate_every=0", ("data.valid has no effect", "train.evaluate_every")),
        ("tasks={rude: 1}", ("unknown setting", "tasks.rude")),
        ("ranks.policy=grown", ("ranks.policy", "did you mean 'grow'")),
        (
            "ranks={policy: layered, depth: up, every: 3}",
            ("ranks.every has no effect", "plan, depth, budget, min, max"),
        ),
        ("data.format=text", ("train.objective=text",)),
        ("output=[1]", ("output", "folder")),
        ("nonsense", ("nonsense", "key=value")),
        ("=3", ("key=value",)),
        ("train..lr=3", ("key=value",)),
        ("train.lr={", ("train.lr={", "YAML")),
    ],
)
def test_a_wrong_setting_is_one_line(run_file: Path, override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as error:
        read_run(run_file, [override])
    assert all(word in error.value.message for word in words), error.value.message
    assert "\n" not in str(error.value)


def test_an_objective_that_the_format_does_not_have(run_file: Path) -> None:
    with pytest.raises(RequestError, match="holds answers"):
        read_run(run_file, ["train.objective=text", "data.format=messages"])


def test_samples_need_validation_data(run_file: Path) -> None:
    none = ["data.valid=null", "data.valid_split=0", "train.evaluate_every=auto"]
    with pytest.raises(RequestError, match=r"train.samples \(2\) has no effect without data.valid"):
        read_run(run_file, [*none, "train.samples=2"])
    with pytest.raises(RequestError, match=r"train.sample_tokens \(9\) has no effect without data.valid"):
        read_run(
            run_file, ["data.valid=null", "data.valid_split=0", "train.evaluate_every=auto", "train.sample_tokens=9"]
        )


def test_from_as_an_override_replaces_the_section(run_file: Path, tmp_path: Path, monkeypatch) -> None:
    """What a failed run advises works on the run file as it is."""
    monkeypatch.chdir(tmp_path)
    assert read_run(run_file, ["adapter.from=old"]).adapter == StartFrom(str(tmp_path / "old"))
    for overrides in (["adapter.r=8", "adapter.from=old"], ["adapter.from=old", "adapter.r=8"]):
        with pytest.raises(RequestError, match=r"adapter\.r has no effect with adapter\.from"):
            read_run(run_file, overrides)
    run_file.write_text("adapter: {from: old, r: 8}\ndata: {train: a.jsonl}\n")
    with pytest.raises(RequestError, match=r"adapter\.r has no effect with adapter\.from"):
        read_run(run_file)


def test_defaults_are_not_settings_without_effect(run_file: Path, tmp_path: Path) -> None:
    """What is left at its default does not trip over the rest, also when it is written out in a resolved run file."""
    for overrides in (
        ["train.save_every=null"],
        ["train.samples=0"],
        ["data.valid=null", "train.evaluate_every=auto"],
        ["train.objective=text", "data.format=text"],
        ["adapter.task_type=CAUSAL_LM"],
    ):
        run = read_run(run_file, overrides)
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(run_yaml(run))
        assert read_run(dumped) == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: 1\n", ("not YAML", "line 2")),
        ("- a\n- b\n", ("must hold settings",)),
        ("", ("must hold settings",)),
        ("train: {lr: 1, lr: 2}\n", ("'lr' is set twice", "line 1")),
        ("data: {train: a.jsonl}\nmodel: {name: demo}\ndata: {train: b.jsonl}\n", ("'data' is set twice", "line 3")),
        ("model: {name: demo}\n", ("data.train",)),
        ("data: {train: a.jsonl}\n? [a, b]\n: 1\n", ("list or mapping", "line 2")),
        ("? {a: b}\n: 1\n", ("list or mapping", "line 1")),
        ("data: {train: a.jsonl}\noutput: 2024-99-99\n", ("can't be read (month", "line 2", "quote it")),
        ("data: {train: a.jsonl}\ntrain: {seed: " + "9" * 5000 + "}\n", ("can't be read", "line 2")),
        ("data: " + "[" * 3000 + "]" * 3000, ("nested too deep",)),
        ("data: {train: ~no-such-user/a.jsonl}\n", ("'~no-such-user/a.jsonl'", "no home folder")),
    ],
)
def test_a_broken_run_file(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as error:
        read_run(path)
    assert all(word in error.value.message for word in words), error.value.message


@pytest.mark.parametrize("value", ["2024-13-45", "{? [1] : 2}", "{lr: 1, lr: 2}", "[" * 3000, "9" * 5000])
def test_an_override_that_is_not_yaml(run_file: Path, value: str) -> None:
    with pytest.raises(RequestError, match="is not YAML; quote it"):
        read_run(run_file, [f"train.lr={value}"])


def test_a_missing_run_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no run file"):
        read_run(tmp_path / "gone.yaml")
    with pytest.raises(RequestError, match="is a folder"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name", [f"{section}.{item.name}" for section in SECTIONS for item in fields(SECTIONS[section])]
)
def test_null_is_taken_only_where_the_type_has_it(name: str) -> None:
    """`train.lr=` is null in YAML."""
    section, _, field = name.partition(".")
    document = {"data": {"train": "rows.jsonl"}}
    if type(None) in get_args(get_type_hints(SECTIONS[section])[field]):
        read_run(document, [f"{name}="])
        return
    with pytest.raises(RequestError) as error:
        read_run(document, [f"{name}="])
    assert error.value.message.startswith(f"{name} must be ") and error.value.message.endswith(", not null")


def test_null_is_no_adapters_folder() -> None:
    with pytest.raises(RequestError, match=r"adapter\.from must be text, not null"):
        read_run({"data": {"train": "rows.jsonl"}, "adapter": {"from": None}})
