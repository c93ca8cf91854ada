"""Turns to text, with the part that is trained on: the one place that training, evaluation, generation and chat share.

What is trained: each answer and the token that ends it (on which generation stops), never the header before it. The
text comes from the tokenizer's own chat template or a `.jinja` file (`chat_template.py`), or from one of the three
templates of `plain_template.py`. A generation prompt is letter by letter what stands before the answer in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rankwise.data.chat_template import ChatTemplate, read_template
from rankwise.data.config import (
    AUTO,
    COMPLETION,
    PLAIN,
    SEQ2SEQ,
    TEMPLATE_SUFFIX,
    WHOLE,
    DataConfig,
    text_has_no_template,
)
from rankwise.data.formats import TEXT, RowError, Turn
from rankwise.data.plain_template import CompletionTemplate, PlainTemplate, Template, TextTemplate, token_id
from rankwise.data.seq2seq import Seq2SeqTemplate, one_question
from rankwise.errors import RequestError


def template_for(tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str = WHOLE) -> Template:
    """The template that `config.chat_template` and `config.format` ask for, for rows laid out as `layout` says.

    Raises: RequestError when the tokenizer is a slow one, the template file is missing, or the template can't be used.
    """
    if not tokenizer.is_fast:
        raise RequestError(
            f"the tokenizer {type(tokenizer).__name__} ('{tokenizer.name_or_path}') has no fast version, so its tokens "
            "can't be traced to the text; use a model folder with a tokenizer.json"
        )
    if config.format == TEXT:
        return TextTemplate(tokenizer)
    if layout == SEQ2SEQ:
        return _seq2seq_template(tokenizer, config)
    if config.chat_template == PLAIN:
        return PlainTemplate(tokenizer)
    if config.chat_template == COMPLETION:
        return CompletionTemplate(tokenizer)
    if config.has_template_file:
        return _file_template(tokenizer, config)
    if tokenizer.chat_template is None:
        note = (
            'the tokenizer has no chat template: rows are written plainly, as "### User:", "### Assistant:" '
            f"(data.chat_template: {COMPLETION} leaves the headers out, a {TEMPLATE_SUFFIX} file gives others)"
        )
        return PlainTemplate(tokenizer, (note,))
    return ChatTemplate(tokenizer, own_template(tokenizer), "the tokenizer's own chat template")


def _file_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> ChatTemplate:
    return ChatTemplate(tokenizer, read_template(config.chat_template), f"chat template {config.chat_template}")


def _seq2seq_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Template:
    if config.chat_template == PLAIN:
        return Seq2SeqTemplate(tokenizer, PlainTemplate(tokenizer).prompt)
    if config.chat_template == COMPLETION or (config.chat_template == AUTO and tokenizer.chat_template is None):
        return Seq2SeqTemplate(tokenizer, one_question)
    chat = _file_template(tokenizer, config) if config.has_template_file else template_for(tokenizer, config)
    assert isinstance(chat, ChatTemplate)
    return Seq2SeqTemplate(tokenizer, chat.prompt, chat.end, is_whole=True, notes=chat.notes)


def text_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Template:
    """The template for rows recognised as text.

    Raises: RequestError when `config` asks for a chat template, which would have no effect.
    """
    if config.chat_template != AUTO:
        raise RequestError(text_has_no_template(config.chat_template))
    return template_for(tokenizer, dataclasses.replace(config, format=TEXT))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], config: DataConfig, layout: str = WHOLE
) -> tuple[str, tuple[int, ...]]:
    """Text and token ids from which the answer to `turns` is generated, exactly as training saw them.

    Raises: RequestError when the template can't take these turns.
    """
    template = template_for(tokenizer, config, layout)
    try:
        text = template.prompt(turns)
    except RowError as reason:
        raise RequestError(f"these turns can't be a prompt: {reason}") from None
    return text, (*template.prefix_ids, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, config: DataConfig, layout: str = WHOLE) -> tuple[int, ...]:
    """The tokens on which generation stops: the one that ends an answer, then the tokenizer's end-of-text token.

    Raises: RequestError when there is none.
    """
    tokens = template_for(tokenizer, config, layout).stop_tokens
    if tokenizer.eos_token_id is not None:
        tokens = (*tokens, str(tokenizer.eos_token))
    return tuple(dict.fromkeys(token_id(tokenizer, token) for token in tokens))


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; of several, the one named default.

    Raises: RequestError when there are several and none of that name.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise RequestError(
                f"the tokenizer has several chat templates ({', '.join(sorted(templates))}) and no default; "
                "set data.chat_template to the path of a .jinja file"
            )
        return templates["default"]
    assert templates is not None
    return templates
