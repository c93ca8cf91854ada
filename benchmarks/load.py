"""What attaching and loading an adapter cost, against PEFT: 200M parameters, r 16, all linear layers.

python benchmarks/load.py --rounds 20 --out benchmarks/results/load.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import peft
import torch
from measure import header, interleaved, ratio_row, report, settings_of
from peft.utils.hotswap import hotswap_adapter
from step import SIZES, build

import rankwise as rw


def main() -> None:
    """Measures attach, first load and swap, each beside PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="200M")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as root:
        folder = str(Path(root) / "adapter")
        plain, swapped = build(options.size, torch.bfloat16), build(options.size, torch.bfloat16)
        rw.attach(swapped, rw.LoraConfig(init_lora_weights=False))
        rw.save_adapter(swapped, folder)
        theirs = build(options.size, torch.bfloat16)
        hot = peft.PeftModel.from_pretrained(build(options.size, torch.bfloat16), folder)

        def attach_ours() -> None:
            rw.detach(rw.attach(plain, rw.LoraConfig()))

        def attach_peft() -> None:
            peft.get_peft_model(theirs, config).unload()

        def load_ours() -> None:
            rw.detach(rw.load_adapter(plain, folder))

        def load_peft() -> None:
            peft.PeftModel.from_pretrained(theirs, folder).unload()

        times = interleaved(
            {
                "attach and detach, ours": attach_ours,
                "attach and unload, PEFT": attach_peft,
                "load and detach, ours": load_ours,
                "load and unload, PEFT": load_peft,
                "swap, ours": lambda: rw.load_adapter(swapped, folder),
                "swap, PEFT hotswap_adapter": lambda: hotswap_adapter(hot, folder, "default"),
            },
            options.rounds,
            settings=settings_of("load", options),
            out=options.out,
        )
    pairs = [
        ("attach and detach, ours", "attach and unload, PEFT"),
        ("load and detach, ours", "load and unload, PEFT"),
        ("swap, ours", "swap, PEFT hotswap_adapter"),
    ]
    rows = [ratio_row(f"{a} / {b}", times, a, b) for a, b in pairs]
    report(header(**settings_of("load", options)), rows, options.out)


if __name__ == "__main__":
    main()
