from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.data.config import PREFERENCE, DataConfig
from rankwise.data.fields import RowError
from rankwise.data.loaded import Loaded
from rankwise.data.loader import load_examples
from rankwise.data.preference_batch import collate_preferences
from rankwise.data.preferences import both, from_preference
from rankwise.data.rows import BadRows
from tests import tiny


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
SAME = [
    PAIR,
    {"prompt": [asked("q")], "chosen": [said("good")], "rejected": [said("bad")]},
    {"prompt": [asked("q")], "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": [asked("q"), said("good")], "rejected": [asked("q"), said("bad")]},
    {"chosen": [asked("q"), said("good")], "rejected": [asked("q"), said("bad")]},
]
TALK = {end: [asked("a"), said("b"), asked("c"), said(last)] for end, last in (("chosen", "d"), ("rejected", "e"))}


def load(folder: Path, rows: list[Any], **settings: Any) -> Loaded:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), tiny.tiny_tokenizer(), DataConfig(train=str(path), **settings), PREFERENCE)


def trained(loaded: Loaded, place: int = 0) -> list[str]:
    example = loaded.examples[place]
    return [example.text[slice(*span)] for span in example.spans]


@pytest.mark.parametrize("row", SAME)
def test_the_ways_to_write_a_pair_are_one(row: dict[str, Any], tmp_path: Path) -> None:
    assert from_preference(row) == from_preference(PAIR)
    assert load(tmp_path, [row]).examples[0].input_ids == load(tmp_path, [PAIR]).examples[0].input_ids


def test_each_answer_stands_behind_the_prompt(tmp_path: Path) -> None:
    loaded = load(tmp_path, [PAIR])
    example = loaded.examples[0]
    assert loaded.format == "preference" and trained(loaded) == ["good<|im_end|>", "bad<|im_end|>"]
    decode = tiny.tiny_tokenizer().decode
    cut = example.parts[0]
    for ids, answer in ((example.input_ids[:cut], "good"), (example.input_ids[cut:], "bad")):
        assert decode(list(ids)) == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert (example.prompt_text, example.answer) == ("q", "good")
    assert example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_what_conversations_share_is_the_prompt_and_is_not_compared(tmp_path: Path) -> None:
    assert trained(load(tmp_path, [TALK])) == ["d<|im_end|>", "e<|im_end|>"]
    chosen, rejected = both(from_preference(TALK))
    assert chosen[:3] == rejected[:3] and [turn.train for turn in chosen] == [True, False, True, True]


def test_several_turns_behind_the_prompt_are_all_compared(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": [said("a"), asked("b"), said("c")], "rejected": "d"}
    assert trained(load(tmp_path, [row])) == ["a<|im_end|>", "c<|im_end|>", "d<|im_end|>"]


def test_a_system_text_is_part_of_the_prompt() -> None:
    chosen, rejected = both(from_preference({**PAIR, "system": "s"}))
    assert chosen[0] == rejected[0] and (chosen[0].role, chosen[0].content) == ("system", "s")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected is missing"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing: chosen and rejected are texts"),
        ({**PAIR, "rejected": "good"}, "chosen and rejected are equal"),
        ({**PAIR, "chosen": " "}, "chosen is empty"),
        ({**PAIR, "chosen": 3}, "chosen is a number, must be a text or a list of turns"),
        ({**PAIR, "prompt": 3}, "prompt is a number, must be a list of turns"),
        ({**PAIR, "chosen": [asked("other"), said("a")]}, "chosen begins with a user turn, but not with the turns of"),
        ({**PAIR, "chosen": [asked("q")]}, "chosen has no turn behind the prompt"),
        ({"chosen": [asked("a"), said("b")], "rejected": [asked("c"), said("d")]}, "share no prompt"),
        ({"chosen": [asked("a"), said("b")], "rejected": [asked("a"), said("b")]}, "chosen and rejected are equal"),
        ({"prompt": [asked("q"), said("a")], "chosen": "b", "rejected": "c"}, "another assistant turn"),
        ({**PAIR, "system": "s", "prompt": [{"role": "system", "content": "t"}, asked("q")]}, "system is given twice"),
        ({"chosen": [asked("a"), said("b")], "rejected": [asked("a"), said("c"), asked("d")]}, "ends with a user turn"),
    ],
)
def test_what_is_no_pair_is_said(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=reason):
        from_preference(row)
    with pytest.raises(BadRows, match=rf"rows.jsonl:2: .*{reason}"):
        load(tmp_path, [PAIR, row], format="preference")


def test_a_pair_that_loses_one_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    long = {"prompt": "q" * 60, "chosen": "c", "rejected": "d"}
    loaded = load(tmp_path, [PAIR, long, {**PAIR, "rejected": "b" * 60}], max_length=64)
    assert (loaded.num_truncated, loaded.num_emptied, len(loaded.examples)) == (2, 1, 2)
    assert loaded.examples[1].longest == 64


@pytest.mark.parametrize("packing", [True, False])
def test_batches_hold_both_sides_of_each_pair(packing: bool, tmp_path: Path) -> None:
    examples = load(tmp_path, [PAIR, TALK]).examples
    batch = collate_preferences(examples, 259, packing)
    assert (batch.num_examples, batch.num_trained, batch.sequences.num_examples) == (2, 2, 4)
    assert batch.num_tokens == sum(len(example.input_ids) for example in examples)
    assert batch.sequences.num_trained == sum(example.num_trained for example in examples)
    assert batch.to("cpu").sequences.input_ids.shape[0] == (1 if packing else 4)
