"""Chat templates in the manner of well-known families, their tokenizers, and small helpers of the data tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rankwise.data.config import DataConfig
from rankwise.data.example import Example
from rankwise.data.formats import FORMATS, Turn
from rankwise.data.head_encoder import HEAD_ROWS
from rankwise.data.loader import load_examples
from tests import tiny

WRITTEN = [name for name, form in FORMATS.items() if form.rows not in HEAD_ROWS]
"""Formats whose rows a template writes; those of heads are in test_label_formats.py."""
FIXTURES = Path(__file__).parent / "fixtures"

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION_WITHOUT_END = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
GENERATION_WITH_HEADER = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}<|im_start|>assistant\n{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # an empty thought before the last answer only
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = (  # ChatML with a system turn of its own
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (  # tools in the system turn, calls and results as JSON between tags, results in a user turn
    "<|im_start|>system\n{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}You are Qwen, created by Alibaba Cloud. You are a helpful assistant.{% endif %}"
    "{% if tools %}{{ '\\n\\n# Tools\\n\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '\\n</tools>' }}{% endif %}"
    "<|im_end|>\n{% for message in messages %}"
    "{% if message['role'] == 'user' or (message['role'] == 'assistant' and not message.tool_calls) %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% elif message['role'] == 'assistant' %}<|im_start|>assistant"
    "{% if message['content'] %}{{ '\\n' + message['content'] }}{% endif %}{% for call in message.tool_calls %}"
    "{{ '\\n' }}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\\n' }}<tool_response>\n{{ message['content'] }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # thoughts before the last question are dropped; a last answer without one gets an empty one
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set content = message['content'] %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\\n') }}\n</think>\n\n"
    "{{ content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (  # the end-of-text token closes the whole conversation, another one each turn
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
SYSTEM_IN_LAST_USER_TURN = (  # breaks the prefix property in conversations of several turns
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {% if message == last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }} {% endif %}{{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tokenizer_of(
    template: str | None, tokens: Sequence[str] = (), bos: str | None = None, eos: str | None = None
) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with more special tokens and another template."""
    tokenizer = tiny.tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    if bos is not None:
        tokenizer.bos_token = bos
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, adding <|endoftext|> in front of every text by itself."""
    tokenizer.bos_token = "<|endoftext|>"
    number = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", number)]
    )
    return tokenizer


def merging_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer in which two line breaks in a row are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tiny.SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = template
    return fast


def turns(*contents: str, system: str | None = None) -> tuple[Turn, ...]:
    """User and assistant by turns, after a system turn if there is one."""
    first = () if system is None else (Turn("system", system),)
    return *first, *(Turn(("user", "assistant")[index % 2], content) for index, content in enumerate(contents))


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(*contents: str, system: str | None = None) -> dict:
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in turns(*contents, system=system)]}


def example_of(folder: Path, tokenizer: PreTrainedTokenizerFast, row: dict, **settings: object) -> Example:
    """The one example of a file with one row."""
    path = write_rows(folder / "one.jsonl", [row])
    return load_examples(path, tokenizer, DataConfig(train=path, **settings)).examples[0]  # type: ignore[arg-type]


def marked(example: Example) -> str:
    """The text with its trained parts between ⟦ and ⟧."""
    text = example.text
    for start, end in reversed(example.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text
