"""`rankwise COMMAND ...`: picks the command, imports only that command's module, and answers for how it ended.

A command's module offers three functions: `add_arguments(parser)`, `run(args) -> dict` (its JSON document) and
`show(result)` (the same for people). A document with `error: {code, message}` is printed, and then failed with.
Exit codes: 0 done, 1 the work failed, 2 the request was wrong. With `--json`, stdout holds one JSON document and
nothing else. Nothing here imports torch, unless torchrun has started several processes: these meet first, the first of
them prints the result, and of those that fail one says why (and leaves it where torchrun's own report looks for it).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, cast

import rankwise
from rankwise.errors import RankwiseError, RequestError, did_you_mean


@dataclass(frozen=True)
class Command:
    """Where a command lives, what it does in one line, and whether several processes may do it together."""

    module: str
    summary: str
    takes_processes: bool = False


COMMANDS: dict[str, Command] = {
    "demo": Command("rankwise.cli.demo", "fine-tune a real 135M model on this machine, measure it, merge it"),
    "train": Command("rankwise.cli.train", "one fine-tuning run from a run file", takes_processes=True),
    "find-lr": Command("rankwise.cli.find_lr", "a learning rate for a run file, by a range test, with its curve"),
    "data preview": Command("rankwise.cli.data", "what is masked and what is trained on, before training"),
    "evaluate": Command(
        "rankwise.cli.evaluate", "loss and answers of a model, adapter or run on a data file", takes_processes=True
    ),
    "merge": Command("rankwise.cli.merge", "an adapter folded into its model, with a certificate"),
    "export": Command("rankwise.cli.export", "an adapter in a format that other programs run, compared with torch"),
    "convert-rank": Command("rankwise.cli.convert_rank", "an adapter compressed to lower ranks, with its error"),
    "fold": Command("rankwise.cli.fold", "several adapters under a gate as one, of one task or of the learned mixture"),
    "combine": Command("rankwise.cli.combine", "several adapters made into one, and what each task loses"),
    "generate": Command("rankwise.cli.generate", "answers to prompts"),
    "chat": Command("rankwise.cli.chat", "a conversation in the terminal"),
    "runs": Command("rankwise.cli.runs", "the runs below a folder: status, steps, losses"),
    "inspect": Command("rankwise.cli.inspect", "ranks, sizes and norms of an adapter folder"),
    "conflict": Command("rankwise.cli.conflict", "layers in which the tasks of a run pull apart, and a heat map"),
    "bench run": Command("rankwise.cli.bench", "the missing runs of a suite of experiments, into its store"),
    "bench report": Command("rankwise.cli.bench_report", "a suite's table, with intervals, verdicts and a picture"),
    "bench check": Command("rankwise.cli.bench_check", "stored runs again, compared to the last bit"),
}

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of the libraries below, unless the user has set it: their notices are not ours to print."""


class CommandModule(Protocol):
    """What each module named in `COMMANDS` offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Does the work; the result is the JSON document."""
        ...

    def show(self, result: dict[str, Any]) -> None:
        """Prints the result for people."""
        ...


NEGATIVE = re.compile(r"-((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf(inity)?|nan)$", re.IGNORECASE)
"""A number below 0, as `float` reads it."""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are RequestErrors: one line, exit code 2."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._negative_number_matcher = NEGATIVE  # argparse's own takes -1e-3 for a flag

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        raise RequestError(f"{message} (see `{self.prog} --help`)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Writes a default behind the help where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def command() -> NoReturn:
    """The entry point of the command `rankwise`."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 1 the work failed, 2 the request was wrong."""
    arguments, as_json = _without_json(sys.argv[1:] if argv is None else argv)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with _noting_ctrl_c() as pressed:
        if not _is_one_of_many():
            return _answered(arguments, as_json, pressed)
        return _answered_together(arguments, as_json, pressed)


def _is_one_of_many() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _answered_together(arguments: list[str], as_json: bool, pressed: Sequence[int]) -> int:
    """As `_answered`, for one of several processes: they meet, so that one of them can speak for all."""
    from rankwise import distributed

    try:
        distributed.join()
    except RankwiseError as error:
        return _fail(error.code, error.message, as_json)
    code = _answered(arguments, as_json, pressed)
    if code == 0:  # else another process may be gone, and leaving in order would wait for it
        distributed.leave()
    return code


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is noted: a library that is being imported may swallow it, and then
    fail for want of its other half.
    """
    pressed: list[int] = []

    def take(number: int, frame: FrameType | None) -> NoReturn:
        pressed.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield pressed  # someone else has decided what Ctrl-C does
        return
    signal.signal(signal.SIGINT, take)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _answered(arguments: list[str], as_json: bool, pressed: Sequence[int]) -> int:
    """The exit code; whatever goes wrong is one line. `pressed`: what `_noting_ctrl_c` has noted."""
    try:
        return _dispatch(arguments, as_json)
    except RankwiseError as error:
        for line in error.details:
            print(line, file=sys.stderr)
        return _fail(error.code, error.message, as_json)
    except KeyboardInterrupt:
        return _fail(1, "interrupted", as_json)
    except BrokenPipeError:  # the reader of our output has gone (`rankwise ... | head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 (the command's outermost edge: anything unexpected ends in one line)
        if os.environ.get("RANKWISE_DEBUG"):
            traceback.print_exc()
        if pressed:
            return _fail(1, "interrupted", as_json)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(1, f"unexpected {text} (RANKWISE_DEBUG=1 shows the traceback)", as_json)


def _without_json(argv: Sequence[str]) -> tuple[list[str], bool]:
    """`--json` may stand anywhere on the line, up to a `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    head = [word for word in argv[:end] if word != "--json"]
    return [*head, *argv[end:]], len(head) < end


def _dispatch(arguments: list[str], as_json: bool) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        _print_json({"version": rankwise.__version__}) if as_json else print(f"rankwise {rankwise.__version__}")
        return 0
    if arguments and arguments[0] in ("--help", "-h"):
        print(overview())
        return 0
    name, rest = _chosen(arguments)
    if name in COMMANDS and _is_one_of_many() and not COMMANDS[name].takes_processes:
        able = " and ".join(f"`{other}`" for other, entry in COMMANDS.items() if entry.takes_processes)
        raise RequestError(f"`rankwise {name}` works in one process (several can do {able}); start it without torchrun")
    if name not in COMMANDS:  # a group, as `data`, asked for its help
        print(overview(prefix=f"{name} "))
        return 0
    module = cast(CommandModule, importlib.import_module(COMMANDS[name].module))
    parser = Parser(f"rankwise {name}", description=COMMANDS[name].summary, allow_abbrev=False, formatter_class=Help)
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    try:
        args = parse(parser, rest)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = module.run(args)
    if _is_one_of_many() and os.environ.get("RANK") != "0":
        return 0
    _print_json(result) if as_json else module.show(result)
    failure = result.get("error")  # of a merge, a number: its rounding error
    if not isinstance(failure, Mapping):
        return 0
    print(f"rankwise: error: {failure['message']}", file=sys.stderr)
    return int(failure["code"])


def _chosen(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it."""
    if not arguments:
        raise RequestError(f"no command given; one of: {', '.join(COMMANDS)} (see `rankwise --help`)")
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    word = arguments[0]
    if word.startswith("-"):
        raise RequestError(f"unknown flag '{word}' before the command; `rankwise --help` lists the commands")
    inside = [name for name in COMMANDS if name.startswith(f"{word} ")]
    if inside and arguments[1:2] in (["--help"], ["-h"]):
        return word, arguments[1:]
    if inside:
        asked = " ".join(arguments[:2])
        raise RequestError(f"unknown command '{asked}'; did you mean {' or '.join(repr(name) for name in inside)}?")
    raise RequestError(f"unknown command '{word}'{did_you_mean(word, COMMANDS)}")


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parses with flags and values in any order; an unknown flag names the nearest one.

    Raises: RequestError.
    """
    if "--" in arguments:  # what follows are values; the intermixed parser would read flags among them
        args, unknown = parser.parse_known_args(arguments)
    else:
        args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].split("=", 1)[0]
        known = did_you_mean(word, flags) if word.startswith("-") else f"; see `{parser.prog} --help`"
        raise RequestError(f"{parser.prog} does not take '{word}'{known}")
    return args


def overview(prefix: str = "") -> str:
    """The text of `rankwise --help`, or of a group's help: commands that start with `prefix`."""
    rows = {name: entry.summary for name, entry in COMMANDS.items() if name.startswith(prefix)}
    width = max(len(name) for name in rows)
    return "\n".join(
        [
            f"usage: rankwise {prefix}COMMAND ... [--json]",
            "",
            "LoRA fine-tuning from data to a deployed adapter.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {summary}" for name, summary in rows.items()),
            "",
            "`rankwise COMMAND --help` lists a command's flags; `rankwise --version` prints the version.",
            "Exit codes: 0 done, 1 the work failed, 2 the request was wrong. RANKWISE_DEBUG=1 shows tracebacks.",
        ]
    )


def _fail(code: int, message: str, as_json: bool) -> int:
    if _is_one_of_many():
        if not _speaks(message):
            return code
        as_json = as_json and not _has_another_try()  # one document: that of the last attempt
    if as_json:
        _print_json({"error": {"code": code, "message": message}})
    print(f"rankwise: error: {message}", file=sys.stderr)
    return code


def _speaks(message: str) -> bool:
    """Whether this one of several processes is to say why they fail; it is then noted for torchrun's report too."""
    from rankwise import distributed

    if not distributed.says_why():
        return False
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        document = {"message": {"message": message, "extraInfo": extra}}
        with contextlib.suppress(OSError):  # the report then says less; the message is on stderr anyhow
            Path(file).write_text(json.dumps(document), encoding="utf-8")
    return True


def _has_another_try() -> bool:
    """Whether torchrun starts the job again when it fails."""
    done, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(done) < int(most)


def _print_json(document: Mapping[str, Any]) -> None:
    print(json.dumps(_finite(document), indent=2, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
