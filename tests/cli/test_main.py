from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from argparse import ArgumentParser
from importlib import import_module

import pytest

import rankwise
from rankwise.cli import main as cli
from rankwise.errors import RequestError, WorkError

LIGHT = """
import json, sys
from rankwise.cli.main import main
codes = [main(line) for line in json.loads(sys.argv[1])]
heavy = [name for name in ("torch", "transformers", "numpy", "sacrebleu", "matplotlib") if name in sys.modules]
print(json.dumps({"codes": codes, "heavy": heavy}))
"""


def in_subprocess(lines):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(lines)], capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_help_of_everything_without_torch():
    lines = [["--help"], ["--version"], ["data", "--help"], *([*name.split(), "--help"] for name in cli.COMMANDS)]
    seen, text = in_subprocess(lines)
    assert seen == {"codes": [0] * len(lines), "heavy": []}
    for name, entry in cli.COMMANDS.items():
        assert name in text and entry.summary in text and f"usage: rankwise {name}" in text


def test_wrong_requests_are_refused_without_torch():
    lines = [[], ["evluate"], ["--nope"], ["merge"], ["evaluate", "x", "--rows", "0"], ["merge", "x", "--ot", "y"]]
    seen, _ = in_subprocess(lines)
    assert seen == {"codes": [2] * len(lines), "heavy": []}


def test_the_command_is_installed_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rankwise", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rankwise {rankwise.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "rankwise", "marge"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no command given; one of: demo, train, find-lr, data preview"),
        (["evluate"], "unknown command 'evluate'; did you mean 'evaluate'?"),
        (["serve"], "unknown command 'serve'"),
        (["data"], "unknown command 'data'; did you mean 'data preview'?"),
        (["data", "prevue", "x"], "unknown command 'data prevue'; did you mean 'data preview'?"),
        (["--jsn"], "unknown flag '--jsn' before the command"),
        (["merge", "x"], "the following arguments are required: --out"),
        (["merge", "x", "--out", "y", "--dtpe", "bf16"], "does not take '--dtpe'; did you mean '--dtype'?"),
        (["merge", "x", "y", "--out", "z"], "rankwise merge does not take 'y'"),
        (["merge", "x", "--out", "y", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["evaluate", "x", "--rows", "-3"], "argument --rows: must be a whole number from 1, not '-3'"),
        (["evaluate", "x", "--rows", "ten"], "argument --rows: must be a whole number from 1, not 'ten'"),
        (["generate", "x"], "the following arguments are required: --prompt"),
    ],
)
def test_a_wrong_line_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rankwise: error: ") and err.count("\n") == 1
    assert message in err
    assert cli.main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert list(document) == ["error"] and document["error"]["code"] == 2 and message in document["error"]["message"]


def fake_command(monkeypatch, run, show=lambda result: print("shown", result["x"])):
    module = types.ModuleType("rankwise.cli.fake")
    module.add_arguments = lambda parser: (parser.add_argument("file"), parser.add_argument("--rows", type=int))
    module.run, module.show = run, show
    monkeypatch.setitem(sys.modules, "rankwise.cli.fake", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("rankwise.cli.fake", "for tests"))


def raising(error):
    def run(args):
        raise error

    return run


def test_json_is_all_there_is_on_stdout(monkeypatch, capsys):
    def run(args):
        print("chatter of some library")
        return {"x": [1, args.rows], "bad": float("nan"), "worse": {"deep": (float("inf"),)}, "file": args.file}

    fake_command(monkeypatch, run)
    for argv in (["fake", "f", "--rows", "3", "--json"], ["--json", "fake", "--rows", "3", "f"]):
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"x": [1, 3], "bad": None, "worse": {"deep": [None]}, "file": "f"}
        assert err == "chatter of some library\n"
    assert cli.main(["fake", "f", "--rows", "3"]) == 0
    assert capsys.readouterr().out == "chatter of some library\nshown [1, 3]\n"


@pytest.mark.parametrize(
    "error, code, message",
    [
        (RequestError("no such\nfolder 'x'"), 2, "no such folder 'x'"),
        (WorkError("the loss diverged"), 1, "the loss diverged"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (KeyError("lost\nkey"), 1, r"unexpected KeyError: 'lost\\nkey' (RANKWISE_DEBUG=1 shows the traceback)"),
    ],
)
def test_failures_are_one_line(monkeypatch, capsys, error, code, message):
    monkeypatch.delenv("RANKWISE_DEBUG", raising=False)
    fake_command(monkeypatch, raising(error))
    assert cli.main(["fake", "f"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"rankwise: error: {message}\n".replace(r"\\n", r"\n"))
    assert cli.main(["fake", "f", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == {"code": code, "message": message.replace(r"\\n", r"\n")}


def test_ctrl_c_that_a_library_swallows_is_still_an_interruption(monkeypatch, capsys):
    """Importing is full of extensions that turn it into an error of their own."""

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half a library") from None

    fake_command(monkeypatch, run)
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["fake", "f"]) == 1
    assert capsys.readouterr().err == "rankwise: error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    fake_command(monkeypatch, raising(KeyError("lost")))
    assert cli.main(["fake", "f"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_document_that_holds_an_error_is_printed_and_fails(monkeypatch, capsys):
    result = {"x": 1, "error": {"code": 2, "message": "3 rows cannot be read"}}
    fake_command(monkeypatch, lambda args: result)
    assert cli.main(["fake", "f", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == result and err == "rankwise: error: 3 rows cannot be read\n"
    assert cli.main(["fake", "f"]) == 2
    assert capsys.readouterr().out == "shown 1\n"


def test_values_after_two_dashes_are_values(monkeypatch, capsys):
    fake_command(monkeypatch, lambda args: {"x": args.file})
    assert cli.main(["fake", "--", "--json"]) == 0
    assert capsys.readouterr().out == "shown --json\n"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_keeps_the_contract(name):
    module = import_module(cli.COMMANDS[name].module)
    parser = ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run) and callable(module.show)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert "--json" not in flags, "cli.main adds it"


@pytest.mark.parametrize("number", ["-1", "-0.5", "-.5", "-2.", "-1e-3", "-1E+3", "-2.5e-05", "-inf", "-nan"])
def test_numbers_below_zero_are_values(number):
    parser = cli.Parser("p")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--weights", nargs="+", type=float)
    parser.add_argument("--below", type=float)
    for line in (["a", "b", "--weights", "1", number], ["--weights", number, "1", "--below", number, "--", "a", "b"]):
        args = cli.parse(parser, line)
        assert args.names == ["a", "b"] and str(float(number)) in [str(weight) for weight in args.weights]
    with pytest.raises(RequestError, match="does not take '-e3'"):
        cli.parse(parser, ["a", "-e3"])


def test_commands_take_numbers_below_zero(capsys):
    for line, message in (
        (["combine", "no", "none", "--weights", "1", "-1e-3", "--out", "x"], "there is no run or adapter folder 'no'"),
        (["conflict", "no", "--below", "-1e-1"], "'no' is no run's folder"),
        (["conflict", "no", "--below", "-1e1"], "--below is a cosine"),
    ):
        assert cli.main(line) == 2
        assert message in capsys.readouterr().err, line
