"""The pages in docs/ and the README say what the code does: settings, flags, JSON fields, names, rooms, links."""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import rankwise
from rankwise.cli import main as cli
from rankwise.recipes.run import SECTIONS, RunConfig, StartFrom, build_run, read_run
from rankwise.recipes.run_yaml import FROM
from tests.recipes.trained import rows, run_document, save_model, write_rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS_PAGE = (DOCS / "commands.md").read_text(encoding="utf-8")
RUN_FILE_PAGE = (DOCS / "run-file.md").read_text(encoding="utf-8")

_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Text below each heading of the second level, by that heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table_rows(text: str, width: int) -> list[list[str]]:
    """Cells of the rows of all tables with so many columns; headings are left out."""
    rows: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\n)+", _FENCED.sub("", text), re.MULTILINE):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        assert all(len(row) == len(cells[0]) for row in cells), f"a torn table: {table}"
        rows += [row for row in cells[2:] if len(row) == width]
    return rows


# --- the run file --------------------------------------------------------------------------------------------------


def documented_type(field: dataclasses.Field) -> str:
    return " or ".join("null" if part == "None" else part for part in str(field.type).split(" | "))


def documented_default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return json.dumps(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return field.default if isinstance(field.default, str) else json.dumps(field.default)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_setting_with_its_type_and_default(name):
    text = sections(RUN_FILE_PAGE)[name]
    found = {row[0]: (row[1], row[2]) for row in table_rows(text, 5) if row[0] != f"`{FROM}`"}
    fields = dataclasses.fields(SECTIONS[name])
    assert found == {f"`{f.name}`": (documented_type(f), f"`{documented_default(f)}`") for f in fields}
    assert all(row[3] for row in table_rows(text, 5)), "a setting has no meaning"


def test_settings_beside_the_sections():
    beside = [row[0] for row in table_rows(sections(RUN_FILE_PAGE)["output"], 5)]
    assert {f.name for f in dataclasses.fields(RunConfig)} == {*SECTIONS, *(name.strip("`") for name in beside)}
    assert f"`{FROM}`" in [row[0] for row in table_rows(sections(RUN_FILE_PAGE)["adapter"], 5)]
    assert [f.name for f in dataclasses.fields(StartFrom)] == ["folder"]


def yaml_examples() -> list[tuple[str, str]]:
    pages = [*PAGES, ROOT / "README.md"]
    return [
        (page.name, code)
        for page in pages
        for code in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]


def test_there_are_examples():
    assert {"run-file.md", "index.md", "README.md"} <= {page for page, _ in yaml_examples()}


@pytest.mark.parametrize(("page", "code"), yaml_examples())
def test_examples_of_run_files_are_accepted(page, code):
    assert build_run(yaml.safe_load(code)).output


def test_every_file_of_the_output_folder_is_named(run):
    found = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    named = {row[0].strip("`").split("/")[0] for row in table_rows(sections(RUN_FILE_PAGE)["The output folder"], 2)}
    assert found <= named
    figures = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(f"`{name}`" in sections(RUN_FILE_PAGE)["The output folder"] for name in figures)


def test_settings_free_to_change_when_going_on():
    from rankwise.recipes.resume import FREE, LENGTH, PROCESSES, ROUNDING

    text = sections(RUN_FILE_PAGE)["Going on"]
    assert {*FREE, *ROUNDING, *LENGTH} - {PROCESSES} == set(
        re.findall(r"`((?:model|data|train|tasks)\.\w+|output)`", text)
    )


# --- the command line ----------------------------------------------------------------------------------------------


def parser_of(name: str) -> ArgumentParser:
    parser = cli.Parser(f"rankwise {name}", allow_abbrev=False)
    import_module(cli.COMMANDS[name].module).add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return parser


def command_sections() -> dict[str, str]:
    found = sections(COMMANDS_PAGE)
    return {name.removeprefix("rankwise "): text for name, text in found.items() if name.startswith("rankwise ")}


def test_every_command_has_its_section_and_no_other():
    assert list(command_sections()) == list(cli.COMMANDS)
    assert cli.overview() in COMMANDS_PAGE


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_is_described_and_no_other(name):
    text = command_sections()[name]
    actions = [action for action in parser_of(name)._actions if action.dest != "help"]
    flags = {action.option_strings[-1] for action in actions if action.option_strings}
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    shown = set(re.findall(r"`(--[\w-]+)", table))
    assert shown == flags
    for action in actions:
        if not action.option_strings:
            assert f"`{action.metavar}`" in table, action.metavar
    prose = _FENCED.sub("", text)
    everything = {flag for other in cli.COMMANDS for a in parser_of(other)._actions for flag in a.option_strings}
    assert set(re.findall(r"(--[a-z][\w-]+)", prose)) <= everything
    for action in actions:
        if action.option_strings and action.default not in (None, False) and "as for `evaluate`" not in table:
            line = next(line for line in table.splitlines() if f"`{action.option_strings[-1]}" in line)
            assert str(action.default) in line.split("|")[2], f"the default of {action.option_strings[-1]}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with samples and a checkpoint."""
    from rankwise.recipes.finetune import train

    root = tmp_path_factory.mktemp("docs")
    train(run_document(root, save_model(root / "model"), steps=2, samples=1, sample_tokens=2, save_every=2), quiet=True)
    return root / "run"


@pytest.fixture
def document(capsys):
    def called(*argv) -> dict:
        capsys.readouterr()
        assert cli.main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return called


def check_fields(name: str, fields) -> None:
    text = command_sections()[name]
    missing = [field for field in fields if not re.search(rf"(?<![\w-]){field}(?![\w-])", _FENCED.sub("", text))]
    assert not missing, f"{name}: JSON fields that docs/commands.md does not name"


def test_json_fields_are_described(run, document, tmp_path):
    from rankwise.recipes.combine_losses import Tuned

    speed = ["--device", "cpu", "--precision", "fp32", "--max-new-tokens", 2]
    seen = {
        "train": json.loads((run / "summary.json").read_text()),
        "data preview": document("data", "preview", run / "run.yaml"),
        "evaluate": document("evaluate", run, "--rows", 2, *speed),
        "merge": document("merge", run, "--out", tmp_path / "merged", "--device", "cpu"),
        "export": document("export", run, "--to", "merged", "--out", tmp_path / "exported", "--device", "cpu"),
        "convert-rank": document("convert-rank", run, "--rank", 2, "--out", tmp_path / "small"),
        "combine": document("combine", run, run, "--out", tmp_path / "both", "--tasks", "--device", "cpu"),
        "generate": document("generate", run, "--prompt", "a", *speed),
        "inspect": document("inspect", run),
    }
    for name, fields in seen.items():
        check_fields(name, fields)
    check_fields("evaluate", seen["evaluate"]["results"][0])
    check_fields("merge", seen["merge"]["certificate"])
    check_fields("export", seen["export"]["report"][0])
    check_fields("inspect", seen["inspect"]["modules"][0])
    check_fields("convert-rank", seen["convert-rank"]["modules"][0])
    check_fields("combine", [*seen["combine"]["modules"][0], *seen["combine"]["tasks"][0]])
    check_fields("combine", [field.name for field in dataclasses.fields(Tuned)])
    check_fields("data preview", seen["data preview"]["examples"][0])
    check_fields("generate", seen["generate"]["results"][0])


def test_metrics_and_bounds_are_those_of_the_code():
    from rankwise.evaluate.answers import LOSS_METRICS, METRICS
    from rankwise.export.certificate import KL_BOUNDS

    assert set(re.findall(r"`(\w+)`", command_sections()["evaluate"])) >= {*LOSS_METRICS, *METRICS}
    bounds = dict(re.findall(r"(\d+e-\d+) for (fp32|fp16|bf16)", command_sections()["merge"]))
    assert {name: float(bound) for bound, name in bounds.items()} == KL_BOUNDS


# --- the library ---------------------------------------------------------------------------------------------------


def test_every_name_of_the_library_and_no_other():
    text = (DOCS / "library.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### rw\.(\w+)$", text, re.MULTILINE)
    assert set(headings) == set(rankwise.SURFACE) and len(headings) == len(rankwise.SURFACE)
    blocks = re.findall(r"^### rw\.(\w+)$.*?^::: ([\w.]+)$", text, re.MULTILINE | re.DOTALL)
    assert dict(blocks) == {name: f"{module}.{attribute}" for name, (module, attribute) in rankwise.SURFACE.items()}
    used = set(re.findall(r"\brw\.(\w+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert used <= set(rankwise.SURFACE)


# --- data and adapters ---------------------------------------------------------------------------------------------


def test_formats_and_templates():
    from rankwise.data.chat import ROLES, UNREAD
    from rankwise.data.config import TEMPLATE_NAMES
    from rankwise.data.formats import FORMATS

    found = sections((DOCS / "data.md").read_text(encoding="utf-8"))
    assert {row[0].strip("`") for row in table_rows(found["Formats"], 4)} == set(FORMATS)
    assert {f"`{name}`" for name in TEMPLATE_NAMES} <= {row[0] for row in table_rows(found["Templates"], 2)}
    assert all(f"`{name}`" in found["Formats"] for name in UNREAD)
    assert all(f"`{name}`" in found["Conversations"] for name in ROLES)


def test_starts_and_layers():
    from rankwise.adapters.config import DATA_STARTS, STARTS
    from rankwise.adapters.layers import LAYER_KINDS

    found = sections((DOCS / "adapters.md").read_text(encoding="utf-8"))
    named = {name for row in table_rows(found["Starts"], 2) for name in re.findall(r"`(\w+)`", row[0])}
    assert named == {"true", "false", "pissa_niter_N", *STARTS, *DATA_STARTS}
    table = "".join(row[0] for row in table_rows(found["Kinds of layers"], 2))
    assert all(cls.__name__ in table for cls in LAYER_KINDS)


def test_methods_of_combining():
    from rankwise.cli.combine import METHODS as NAMED
    from rankwise.tasks.methods import METHODS

    rows = table_rows(sections((DOCS / "combine.md").read_text(encoding="utf-8"))["Methods"], 4)
    takes = {row[0].strip("`"): set(re.findall(r"--(\w+)", row[3])) for row in rows}
    assert takes == {name: method.takes for name, method in METHODS.items()}
    assert set(NAMED) == set(METHODS)


def test_objectives():
    from rankwise.train.needs import NEEDS

    text = (DOCS / "objectives.md").read_text(encoding="utf-8")
    packs = {True: "yes", False: "no"}
    assert {row[0].strip("`"): row[1:] for row in table_rows(text, 6)} == {
        name: [needs.rows, needs.task, needs.task_type, needs.unit, packs[needs.packs]] for name, needs in NEEDS.items()
    }


# --- pages, links, rooms -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", text) for text in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_resolve(page):
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {name for entry in site["nav"] for name in entry.values()} == {page.name for page in PAGES}
    assert site["theme"]["font"] is False, "fonts would be fetched from elsewhere"
    start = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in start for page in PAGES if page.name != "index.md")


def test_the_readme_names_every_room():
    tree = sections((ROOT / "README.md").read_text(encoding="utf-8"))["The tree"]
    shown = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    assert shown == {path.parent.name for path in (ROOT / "rankwise").glob("*/__init__.py")}
    files = {path.name for path in (ROOT / "rankwise").glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"(\w+\.py)", tree)) == files


def test_every_command_of_the_pages_is_one():
    """Commands in the examples parse; overrides and run files in them are not read."""
    texts = [page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"]]
    lines = [
        line for text in texts for line in re.findall(r"^(?:\$ )?(?:printf .* \| )?rankwise (.+)$", text, re.MULTILINE)
    ]
    assert len(lines) > 10
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line.split(" #")[0])
        if words[0].startswith("-") or words == ["train", "run.yaml", "--resum"]:
            continue
        name, rest = cli._chosen(words)
        cli.parse(parser_of(name), [word.strip('"') for word in rest])


def test_the_checks_can_fail(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows(2))
    with pytest.raises(ValueError, match=r"train\.lrr"):
        read_run({"data": {"train": data}, "train": {"lrr": 1}})
    assert table_rows("| setting | a |\n|---|---|\n| `x` | 1 |\n", 2) == [["`x`", "1"]]
    with pytest.raises(AssertionError, match="does not name"):
        check_fields("inspect", ["no_such_field"])
