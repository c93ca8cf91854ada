"""Tools through chat templates: written where the template can, trained on up to the end of the call, else refused."""

from __future__ import annotations

import pytest

from rankwise.data.config import DataConfig
from rankwise.data.rows import BadRows
from rankwise.data.templates import stop_token_ids, template_for
from rankwise.errors import RequestError
from tests import tiny
from tests.data.builders import GENERATION, GENERATION_WITHOUT_END, example_of, marked, tokenizer_of
from tests.data.test_chat import AGENT, CALL, ask, reply, result

CONFIG = DataConfig(train="unused", max_length=2000)
HERMES = (  # in the manner of Qwen 2.5
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n"
    "{% elif message.role == 'user' %}<|im_start|>user\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant\n{{ message.content }}"
    "{% for call in message.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = HERMES.replace("%}\n", "%}{{ '\n' }}")  # transformers trims a line break behind a block
CALL_ENDS_OTHERWISE = HERMES.replace(
    "</tool_call>{% endfor %}<|im_end|>",
    "</tool_call>{% endfor %}{% if message.tool_calls %}<|eom|>{% else %}<|im_end|>{% endif %}{{ '' }}",
)
MASKED = HERMES.replace(
    "\n{{ message.content }}{% for call", "\n{% generation %}{{ message.content }}{% for call"
).replace("{% endfor %}<|im_end|>\n{% endif %}", "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}{% endif %}")
ADDED = ("<tool_call>", "</tool_call>", "<|eom|>")
GOLDEN = (
    "<|im_start|>system\nBe brief.\nTools:\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}'
    "<|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
    '⟦\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>END⟧\n'
    "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n⟦Sunny.<|im_end|>⟧\n"
)


@pytest.mark.parametrize("added", [(), ADDED])
def test_calls_are_trained_on_and_results_are_not(tmp_path, added):
    tokenizer = tokenizer_of(HERMES, added)
    example = example_of(tmp_path, tokenizer, AGENT, max_length=2000)
    assert marked(example) == GOLDEN.replace("END", "<|im_end|>")
    trained = tokenizer.decode([label for label in example.labels if label != -100])
    assert "sunny" not in trained and '"place": "Rome"' in trained
    assert (example.answer, example.prompt_text) == ("Sunny.", "Rome?")


def test_generation_blocks_around_calls(tmp_path):
    assert MASKED != HERMES
    example = example_of(tmp_path, tokenizer_of(MASKED, ADDED), AGENT, max_length=2000)
    assert marked(example) == GOLDEN.replace("END", "<|im_end|>")


def test_a_call_may_end_with_a_token_of_its_own(tmp_path):
    assert CALL_ENDS_OTHERWISE != HERMES
    tokenizer = tokenizer_of(CALL_ENDS_OTHERWISE, ADDED)
    example = example_of(tmp_path, tokenizer, AGENT, max_length=2000)
    assert marked(example) == GOLDEN.replace("END", "<|eom|>")
    numbers = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eom|>")]
    assert list(stop_token_ids(tokenizer, CONFIG)) == numbers, "generation stops on what ends a call"


def test_a_call_at_the_end_is_the_answer(tmp_path):
    row = {"messages": [ask("Rome?"), reply("Let me see.", tool_calls=[CALL])]}
    example = example_of(tmp_path, tokenizer_of(HERMES, ADDED), row, max_length=2000)
    assert example.answer.startswith("Let me see.\n") and '{"name": "weather"' in example.answer
    assert "im_end" not in example.answer
    assert marked(example).endswith("</tool_call><|im_end|>⟧\n")


def test_prompts_hold_the_tools():
    from rankwise.data.formats import FORMATS

    turns = FORMATS["messages"].turns(AGENT)
    prompt = template_for(tokenizer_of(HERMES, ADDED), CONFIG).prompt(turns[:-1])
    assert '"name": "weather"' in prompt and prompt.endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (tiny.CHATML, AGENT, r"chat template does not write tools: it leaves them out of the text; use a template"),
        (tiny.CHATML, {"messages": AGENT["messages"]}, "does not write tool calls: it leaves them out of the text"),
        ("{% for m in messages if m.role == 'tool' %}{{ raise_exception('none') }}{% endfor %}" + HERMES, AGENT,
         "does not write results of tool calls: it fails on them: none"),
        (None, AGENT, "the template 'plain' does not write tools"),
    ],
)  # fmt: skip
def test_templates_that_do_not_write_them_are_refused(tmp_path, template, row, words):
    with pytest.raises(RequestError, match=r"one.jsonl:1: .*" + words):
        example_of(tmp_path, tokenizer_of(template, ADDED), row)


def test_completion_has_no_tools(tmp_path):
    row = {"messages": [ask(), reply("", tool_calls=[CALL])]}
    with pytest.raises(RequestError, match="the template 'completion' does not write tool calls"):
        example_of(tmp_path, tiny.tiny_tokenizer(), row, chat_template="completion")


def test_a_template_that_leaves_the_call_of_this_row_out(tmp_path):
    template = HERMES.replace("message.tool_calls %}", "message.tool_calls if call.function.name != 'weather' %}", 1)
    with pytest.raises(BadRows, match="changes answer 1"):
        example_of(tmp_path, tokenizer_of(template, ADDED), AGENT)


TALK = {"messages": [ask("a"), reply("one", train=False), ask("b"), reply("two"), ask("c"), reply("three", weight=0)]}


@pytest.mark.parametrize("template", [tiny.CHATML, HERMES, GENERATION, GENERATION_WITHOUT_END, None])
def test_answers_that_are_not_trained_on_stay_in_the_text(tmp_path, template):
    example = example_of(tmp_path, tokenizer_of(template), TALK)
    text = marked(example)
    assert text.count("⟦") == 1 and "⟦two<|im_end|>⟧" in text
    assert "one<|im_end|>" in text and "three<|im_end|>" in text
    assert (example.answer, example.prompt_text) == ("three", "c")
    assert example.prompt_ids and example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


def test_blocks_that_are_not_one_an_answer_can_not_be_told_apart(tmp_path):
    template = GENERATION.replace("{{ message['content'] }}<|im_end|>{% endgeneration %}", "{{ message['content'] }}"
                                  "{% endgeneration %}, {% generation %}<|im_end|>{% endgeneration %}")  # fmt: skip
    assert len(example_of(tmp_path, tokenizer_of(template), {"messages": [ask(), reply()]}).spans) == 2
    with pytest.raises(BadRows, match="6 generation blocks for 3 answers, so those with train false or a weight can't"):
        example_of(tmp_path, tokenizer_of(template), TALK)


def test_parallel_calls(tmp_path):
    other = {"id": "call_2", "function": {"name": "time", "arguments": {}}}
    row = {"messages": [ask(), reply("", tool_calls=[CALL, other]), result("x", tool_call_id="call_2"), result("y"),
                        reply()]}  # fmt: skip
    text = marked(example_of(tmp_path, tokenizer_of(HERMES, ADDED), row, max_length=2000))
    assert text.count("⟦") == 2 and text.index('"time"') < text.index("⟧")
