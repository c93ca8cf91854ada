"""`rankwise chat TARGET`: a conversation in the terminal that remembers what was said."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rankwise.cli.arguments import add_onnx, add_target, open_any, positive
from rankwise.errors import RequestError

if TYPE_CHECKING:
    from rankwise.recipes.generate import Conversation

HELP = "/quit ends, /reset forgets the conversation, /base switches the adapter off and on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_target(parser)
    add_onnx(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message that opens the conversation")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="the longest answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Reads lines until /quit or the end of input; the document holds the conversation."""
    from rankwise.recipes.generate import Conversation

    session = open_any(args)
    talk = Conversation(session, args.system, args.max_new_tokens)
    print(f"{args.target} on {session.device}. {HELP}.", file=sys.stderr)
    while (line := _read()) is not None and line != "/quit":
        try:
            _answer(talk, line)
        except RequestError as error:  # such as a conversation that has grown too long: it goes on without this line
            print(f"({error.message})", file=sys.stderr)
    return {"target": args.target, "messages": talk.messages}


def _answer(talk: Conversation, line: str) -> None:
    if line == "/reset":
        talk.reset()
        print("(forgotten)", file=sys.stderr)
    elif line == "/base":
        print(f"({'base alone' if talk.toggle_base() else 'with the adapter'})", file=sys.stderr)
    elif line.startswith("/"):
        print(f"(unknown '{line.split()[0]}': {HELP})", file=sys.stderr)
    elif line:
        print(talk.say(line), flush=True)


def show(result: dict[str, Any]) -> None:
    """Nothing: everything has been said."""


def _read() -> str | None:
    """The next line, stripped; None at the end of input, or on Ctrl-C. The prompt sign is shown to a terminal only."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return None
    return line.strip() if line else None
