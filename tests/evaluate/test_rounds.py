from __future__ import annotations

import pytest
import torch

from rankwise import distributed
from rankwise.evaluate.generate import generate_answers
from rankwise.evaluate.perplexity import measure_loss
from rankwise.evaluate.rounds import rounds
from rankwise.models.sharding import shard
from rankwise.train.objectives import OBJECTIVES
from tests import tiny
from tests.processes import Processes
from tests.train.rows import examples


def test_one_process_takes_everything() -> None:
    assert rounds("abcde", 2, tiny.llama()) == ["ab", "cd", "e"]
    assert rounds("", 2, tiny.llama()) == []


def _found(spread: bool, num_rows: int) -> tuple[object, ...]:
    model, rows = tiny.llama(), examples(num_rows)
    if spread and distributed.world_size() > 1:
        shard(model, (), torch.device("cpu"), num_shares=2)
    taken = rounds(range(num_rows), 2, model)
    likelihood = measure_loss(model, OBJECTIVES["sft"], rows, 259, batch_size=2, packing=False)
    prompts = [row.prompt_ids for row in rows]
    answers = generate_answers(model, tiny.tiny_tokenizer(), prompts, max_new_tokens=5, batch_size=2)
    return [list(chosen) for chosen in taken], likelihood, answers


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_two_processes_share_the_rows_and_agree(spread: bool, num_rows: int, two_processes: Processes) -> None:
    _, likelihood, answers = _found(False, num_rows)
    first, second = two_processes(_found, spread, num_rows)
    assert first[1:] == second[1:] and first[2] == answers
    assert first[1].loss == pytest.approx(likelihood.loss, abs=1e-6)
    assert (first[1].num_units, first[1].num_examples) == (likelihood.num_units, num_rows)
    if spread:
        assert len(first[0]) == len(second[0]), "equally many forward passes"
    dealt = [row for process in (first, second) for chosen in process[0] for row in chosen]
    assert sorted(dealt) == list(range(num_rows))
