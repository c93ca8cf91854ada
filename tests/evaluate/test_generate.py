from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.errors import RequestError
from rankwise.evaluate.generate import answer_text, contiguous_head, generate_answers, padded
from tests import tiny

PROMPTS = [(10, 20, 30, 40, 50, 60), (70, 80), (90, 100, 110, 120), (5,), (6, 7, 8)]


def greedy_by_hand(model, prompt, num, stops):
    ids = list(prompt)
    for _ in range(num):
        with torch.no_grad():
            following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following in stops:
            break
        ids.append(following)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_greedy_decoding_by_hand(name, batch_size, tokenizer):
    """Batches, order and left padding change nothing."""
    model = tiny.CAUSAL_LMS[name]()
    answers = generate_answers(model, tokenizer, PROMPTS, 7, batch_size, stop_ids=[258])
    wanted = [answer_text(tokenizer, greedy_by_hand(model, prompt, 7, [258]), [258]) for prompt in PROMPTS]
    assert answers == wanted
    assert len(set(answers)) > 1


def test_ends_at_a_stop_token(llama, tokenizer):
    first = greedy_by_hand(llama, PROMPTS[0], 6, [])
    answer = generate_answers(llama, tokenizer, PROMPTS[:1], 6, 1, stop_ids=[first[3]])
    end = first.index(first[3])
    assert answer == [answer_text(tokenizer, first[:end], [])]


def test_own_sampling_settings_of_the_model_do_not_enter(llama, tokenizer):
    plain = generate_answers(llama, tokenizer, PROMPTS, 8, 4)
    llama.generation_config.do_sample = True
    llama.generation_config.temperature = 9.0
    llama.generation_config.repetition_penalty = 50.0
    assert generate_answers(llama, tokenizer, PROMPTS, 8, 4) == plain


def test_mode_returns_and_no_hook_stays(llama, tokenizer):
    llama.train()
    llama.model.layers[0].eval()  # each part has a mode of its own
    before = [module.training for module in llama.modules()]
    generate_answers(llama, tokenizer, PROMPTS[:1], 2, 1)
    assert [module.training for module in llama.modules()] == before
    assert not llama.lm_head._forward_pre_hooks


def test_only_the_last_position_reaches_the_head(llama, tokenizer):
    seen = []
    hook = llama.lm_head.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0].shape[1], inputs[0].is_contiguous()))
    )
    generate_answers(llama, tokenizer, PROMPTS, 3, 8)
    hook.remove()
    assert seen and set(seen) == {(1, True)}


def test_contiguous_head_is_removed_after_an_error(llama):
    with pytest.raises(KeyError), contiguous_head(llama):
        raise KeyError
    assert isinstance(llama.lm_head, nn.Linear) and not llama.lm_head._forward_pre_hooks


def test_bad_requests(llama, tokenizer):
    with pytest.raises(RequestError, match="prompt 2 is empty"):
        generate_answers(llama, tokenizer, [(1,), ()], 4, 1)
    with pytest.raises(
        RequestError, match="prompt of 510 tokens with max_new_tokens=4 does not fit into the model's 512"
    ):
        generate_answers(llama, tokenizer, [(1,) * 510], 4, 1)
    with pytest.raises(RequestError, match=r"max_new_tokens \(0\)"):
        generate_answers(llama, tokenizer, [(1,)], 0, 1)


def test_no_prompts_no_answers(llama, tokenizer):
    assert generate_answers(llama, tokenizer, [], 4, 2) == []


def test_left_padding():
    ids, mask = padded([(1, 2, 3), (4,)], 9, torch.device("cpu"), on_left=True)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
