"""Modelfiles: the Go template is what the Jinja template writes, by a small reader of the Go that is used here."""

from __future__ import annotations

import re

import jinja2
import pytest

from rankwise.export.ollama import Turns, go_template, modelfile, turns_of

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "chatml-default": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama-3": (
        "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content }}<|eot|>{% endfor %}"
        "<|head|>assistant<|tail|>\n\n",
        ["<|begin|>", "<|head|>", "<|tail|>", "<|eot|>"],
    ),
    "mistral": (
        "<s>{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.first and s %}{{ s }}\n\n{% endif %}{{ m.content }} [/INST]{% else %}"
        " {{ m.content }}</s>{% endif %}"
        "{% endfor %}",
        ["<s>", "</s>"],
    ),
    "gemma": (
        "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise('no') }}{% endif %}<start>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n{% endfor %}<start>model\n",
        ["<bos>", "<start>", "<end>"],
    ),
    "plain": (
        "{% for m in messages %}### {{ m.role | title }}:\n{{ m.content }}{{ '</s>' if m.role == 'assistant' }}\n\n"
        "{% endfor %}### Assistant:\n",
        ["</s>"],
    ),
}
TALK = [("user", "Hi"), ("assistant", "Yes"), ("user", "Go\n on")]


def renderer(source):
    def refuse(reason):
        raise ValueError(reason)

    template = jinja2.Environment(keep_trailing_newline=True).from_string(source)

    def render(messages):
        return template.render(messages=[{"role": r, "content": c} for r, c in messages], **{"raise": refuse})

    return render


def run_go(template: str, messages) -> str:
    """Runs the part of Go's text/template that `go_template` writes, over what Ollama gives it."""
    words = re.split(r"\{\{ (.*?) \}\}", template)
    system = "".join(content for role, content in messages if role == "system")

    def block(place: int, scope) -> tuple[str, int]:
        out = ""
        while place < len(words):
            if place % 2 == 0:
                out += words[place]
                place += 1
                continue
            word = words[place]
            if word == "end" or word.startswith("else"):
                return out, place
            if word.startswith("range"):
                after = skip(place)
                for i, message in enumerate(messages):
                    out += block(place + 1, {"i": i, "role": message[0], "content": message[1]})[0]
                place = after + 1
            elif word.startswith("if"):
                text, place = branch(place, scope)
                out += text
            else:
                out += {".System": system, "$.System": system, ".Content": scope.get("content", "")}[word]
                place += 1
        return out, place

    def branch(place: int, scope) -> tuple[str, int]:
        done = ""
        taken = False
        while True:
            word = words[place]
            holds = word == "else" or test(word.removeprefix("else ").removeprefix("if "), scope)
            text, place = block(place + 1, scope)
            if holds and not taken:
                done, taken = text, True
            if words[place] == "end":
                return done, place + 1

    def skip(place: int) -> int:
        depth = 0
        while True:
            if words[place].startswith(("range", "if")):
                depth += 1
            if words[place] == "end":
                depth -= 1
                if depth == 0:
                    return place
            place += 2

    def test(condition: str, scope) -> bool:
        if condition == ".System":
            return bool(system)
        if condition == "and $.System (eq $i 1)":
            return bool(system) and scope["i"] == 1
        role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
        assert role is not None, condition
        return scope["role"] == role.group(1)

    return block(0, {})[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_jinja_template_writes(name):
    source, special = TEMPLATES[name]
    render = renderer(source)
    turns = turns_of(render, special)
    assert isinstance(turns, Turns), turns
    conversations = [TALK[:1], TALK, [*TALK, ("assistant", ""), ("user", "x")]]
    if name == "gemma":
        assert turns.system is None
    else:
        conversations += [[("system", "Be\nbrief."), *talk] for talk in conversations]
    for talk in conversations:
        assert turns.render(talk) == render(talk)
        assert run_go(go_template(turns), talk) == render(talk)


def test_heads_begin_with_special_tokens():
    turns = turns_of(renderer(TEMPLATES["chatml-default"][0]), TEMPLATES["chatml-default"][1])
    assert turns.user == ("<|im_start|>user\n", "<|im_end|>\n") and turns.answer == "<|im_start|>assistant\n"
    assert turns.begin == "<|im_start|>system\nYou help.<|im_end|>\n"
    assert turns.system == ("<|im_start|>system\n", "<|im_end|>\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[-1].content }}", "leaves a message out"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
            "is not head, content, tail",
        ),
        ("{% for m in messages %}{{ '{{' }}{{ m.role }}|{{ m.content }};{% endfor %}a", "marks of Go's templates"),
        ("{{ raise('never') }}", r"does not take a plain conversation \(never\)"),
    ],
)
def test_what_is_not_head_content_tail_is_told(source, reason):
    found = turns_of(renderer(source), [])
    assert isinstance(found, str) and re.search(reason, found)


def test_the_file():
    turns = turns_of(renderer(TEMPLATES["chatml"][0]), [])
    text = modelfile("./m.gguf", turns, ["<|im_end|>", 'a"b'], {"temperature": 0.2, "num_ctx": 512}, "./a.gguf")
    lines = text.splitlines()
    assert [lines[0], lines[2]] == ["FROM ./m.gguf", "ADAPTER ./a.gguf"] and "Go itself was not run" in lines[3]
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "a\\"b"' in lines
    assert lines[-2:] == ["PARAMETER temperature 0.2", "PARAMETER num_ctx 512"]
    assert text.count('"""') == 2
    without = modelfile("m", "it is odd", [], {})
    assert without == "FROM m\n# No TEMPLATE: it is odd. Ollama falls back on the template in the GGUF file.\n"
