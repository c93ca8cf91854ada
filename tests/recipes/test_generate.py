from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.data.formats import Turn
from rankwise.data.templates import render_prompt
from rankwise.errors import RequestError
from rankwise.recipes.generate import Conversation, open_session
from tests import tiny
from tests.recipes.trained import save_model, trained_run


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    run: Path = trained_run(tmp_path_factory.mktemp("generate"))
    return open_session(str(run), device="cpu", precision="fp32")


def test_answers_are_those_of_the_rendered_prompt(session):
    """Rendered as in training, by hand: greedy on the model itself."""
    prompts = ["Capitals: oak pine", "Capitals: elm"]
    answers = session.answer_all(prompts, "Be brief.", 5, 8)
    tokenizer, model = session.opened.tokenizer, session.opened.model
    for prompt, answer in zip(prompts, answers, strict=True):
        turns = [Turn("system", "Be brief."), Turn("user", prompt)]
        text, ids = render_prompt(tokenizer, turns, session.opened.target.data_config())
        assert text.endswith("<|im_start|>assistant\n")
        out = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=258)
        assert tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip() == answer
    assert answers[0] != answers[1]


def test_a_plain_template_is_said(tmp_path, capsys):
    tokenizer = tiny.tiny_tokenizer(chat_template=None)
    folder = save_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    session = open_session(folder, device="cpu", precision="fp32")
    assert capsys.readouterr().err.startswith("note: the tokenizer has no chat template")
    assert session.answer_all(["hello"], None, 3, 1)


def test_another_template(session):
    other = open_session(session.opened.target.name, device="cpu", precision="fp32", chat_template="plain")
    assert other.answer_all(["hello"], None, 9, 1) != session.answer_all(["hello"], None, 9, 1)


def test_a_conversation_remembers(session):
    talk = Conversation(session, "Be brief.", 4)
    first = talk.say("hello")
    second = talk.say("again")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in talk.messages] == ["Be brief.", "hello", first, "again", second]
    turns = [Turn(m["role"], m["content"]) for m in talk.messages[:-1]]
    assert session.continue_all([turns], 4, 1) == [second]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert talk.say("hello") == first


def test_the_base_alone_and_back(session):
    talk = Conversation(session, None, 6)
    with_adapter = talk.say("Capitals: oak")
    talk.reset()
    assert talk.toggle_base() is True
    alone = talk.say("Capitals: oak")
    talk.reset()
    assert talk.toggle_base() is False
    assert talk.say("Capitals: oak") == with_adapter != alone


def test_a_turn_that_does_not_fit_is_not_remembered(session):
    talk = Conversation(session, None, 4)
    with pytest.raises(RequestError, match="does not fit into the model's 512 positions"):
        talk.say("x" * 600)
    assert talk.messages == []


def test_bad_requests(session):
    with pytest.raises(RequestError, match="prompt 2 is empty"):
        session.answer_all(["hello", " "], None, 4, 2)
    model = open_session(str(Path(session.opened.target.name).parent / "model"), device="cpu")
    with pytest.raises(RequestError, match="has no adapter to switch off"):
        Conversation(model, None, 4).toggle_base()
