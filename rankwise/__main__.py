"""`python -m rankwise` is the command `rankwise`."""

from __future__ import annotations

from rankwise.cli.main import command

if __name__ == "__main__":
    command()
