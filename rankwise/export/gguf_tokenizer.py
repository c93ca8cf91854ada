"""A tokenizer as GGUF's metadata has it: tokens, their types, merges, and the name of how text is cut before merging.

llama.cpp knows the cutting by name only (`tokenizer.ggml.pre`), so the name is found from the tokenizer's own
normaliser and pre-tokeniser, part by part; one that is none of `PRE_TOKENIZERS` is refused. Pure: no file is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rankwise.errors import RequestError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""
SPACE = "▁"

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTER_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": ("bytes by GPT-2's expression",),
    "smollm": ("digits one by one", "bytes by GPT-2's expression"),
    "llama-bpe": (f"split {_LETTERS}\\p{{N}}{{1,3}}{_REST}", "bytes", "whole words first"),
    "qwen2": ("NFC", f"split {_LETTERS}\\p{{N}}{_REST}", "bytes"),
    "tekken": (rf"split {_LETTER_CASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", "bytes",
               "whole words first"),
}  # fmt: skip
"""llama.cpp's name, and what the tokenizer does before it merges, as `parts_of` writes it."""

HARD_TEXTS = (
    "Hello, world!", " leading and trailing ", "two  spaces, three   spaces", "tabs\tand\nlines\r\n\n\n",
    "I'll, you've", "3.14159 and 1,000,000 in 2024", "naïve café, Zoë, Ångström", "日本語のテキスト", "Привет, мир",
    "שלום עולם", "🙂👩‍👩‍👧 emoji", "def f(x):\n    return x ** 2  # square", "CamelCase snake_case",
    "kebab-case", "a" * 70, "\u00a0\u2003\u3000",
    "e\u0301 is not \u00e9", "", "\\n \\t", "<tag attr='v'>&amp;</tag>", "¡Hola! ¿Qué tal?",
)  # fmt: skip
"""Texts that a tokenizer read back from the file must cut as the original does."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of the tokenizer.

    Args:
        model: GGUF's kind of tokenizer: `gpt2` for BPE over bytes, `llama` for pieces in SentencePiece's way.
        pre: GGUF's name of the pre-tokeniser.
        tokens, types: one for each row of the embedding.
        merges: `left right`, in order of rank.
        scores: of each token, for `llama`; the highest is joined first.
        special: bos, eos, unk, pad to the token's id; those that there are.
        add_bos, add_eos: whether a text begins or ends with those.
        adds_space: whether a space is put before a text, for `llama`.
        chat_template: Jinja, or None.
        num_padded: how many rows have no token.
        notes: what llama.cpp is known to cut otherwise.
        normalises: whether the tokenizer brings texts into Unicode's NFC first, which llama.cpp does not.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    scores: Sequence[float] = ()
    adds_space: bool = False
    chat_template: str | None = None
    num_padded: int = 0
    normalises: bool = False
    notes: Sequence[str] = ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, num_rows: int, chat_template: str | None) -> Vocabulary:
    """The vocabulary of a fast BPE tokenizer, for an embedding of `num_rows` rows.

    Rows that no token has are filled with unused ones.

    Raises: RequestError for a tokenizer of another kind, or one whose pre-tokeniser llama.cpp does not have.
    """
    document = _document(tokenizer)
    model = document["model"]
    if model["type"] != "BPE":
        raise RequestError(
            f"the tokenizer is a {model['type']}, which --to gguf can't hold; it can hold BPE over bytes (Llama 3, "
            "SmolLM2, Qwen, Mistral Nemo) and BPE with byte fallback (Llama 2, Mistral 7B)"
        )
    tokens, types, num_padded = _tokens(document, num_rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    by_pieces = model.get("byte_fallback", False)
    pre = "default" if by_pieces else pre_tokenizer_name(document)
    add_bos, add_eos = _ends(tokenizer)
    return Vocabulary(
        "llama" if by_pieces else "gpt2", pre, tokens, types, merges, _special(tokenizer), add_bos, add_eos,
        scores=_scores(tokens, merges) if by_pieces else (), adds_space=by_pieces and adds_space(document),
        chat_template=chat_template, num_padded=num_padded, normalises="NFC" in parts_of(document),
        notes=_notes(document, pre),
    )  # fmt: skip


def _document(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise RequestError(
            f"the tokenizer {type(tokenizer).__name__} has no fast version, from which --to gguf takes the vocabulary; "
            "use a model folder with a tokenizer.json"
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]


def _tokens(document: Mapping[str, Any], num_rows: int) -> tuple[list[str], list[int], int]:
    """Texts and types by id, and how many rows have no token."""
    model = document["model"]
    texts: dict[int, str] = {index: text for text, index in model["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    if model.get("byte_fallback", False):
        types.update({index: BYTE for index, text in texts.items() if len(text) == 6 and text.startswith("<0x")})
    for added in document["added_tokens"]:
        texts[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if model.get("unk_token") is not None:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    highest = max(texts)
    if highest >= num_rows:
        raise RequestError(
            f"the tokenizer has a token '{texts[highest]}' of id {highest}, and the model's embedding {num_rows} rows; "
            "resize the model's embeddings to the tokenizer"
        )
    missing = [index for index in range(num_rows) if index not in texts]
    texts.update({index: f"[PAD{index}]" for index in missing})
    types.update(dict.fromkeys(missing, UNUSED))
    rows = range(num_rows)
    return [texts[index] for index in rows], [types[index] for index in rows], len(missing)


def pre_tokenizer_name(document: Mapping[str, Any]) -> str:
    """llama.cpp's name for what is done to a text before merging.

    Raises: RequestError when it has none.
    """
    parts = parts_of(document)
    for name, known in PRE_TOKENIZERS.items():
        if known == parts:
            return name
    raise _unnamed(document, ", ".join(PRE_TOKENIZERS))


def adds_space(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of pieces puts a space before a text.

    Raises: RequestError for one that writes spaces in another way than SentencePiece.
    """
    parts = [*_flat(document.get("normalizer"), "normalizers"), *_flat(document.get("pre_tokenizer"), "pretokenizers")]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if parts == [{"type": "Prepend", "prepend": SPACE}, replaces]:
        return True
    if parts == [replaces]:
        return False
    if [part["type"] for part in parts] == ["Metaspace"] and parts[0]["replacement"] == SPACE:
        return parts[0]["prepend_scheme"] != "never"
    raise _unnamed(document, f"spaces as '{SPACE}', with or without one before the text")


def _unnamed(document: Mapping[str, Any], known: str) -> RequestError:
    return RequestError(
        f"the tokenizer cuts text in a way ({'; '.join(parts_of(document)) or 'not at all'}) that --to gguf can't name "
        f"to llama.cpp; known: {known}; a file under another name would cut text wrongly, so none is written"
    )


def parts_of(document: Mapping[str, Any]) -> tuple[str, ...]:
    """Normaliser, pre-tokeniser and merging rule of a `tokenizer.json`, one line for each part."""
    parts = []
    for step in _flat(document.get("normalizer"), "normalizers"):
        parts.append(step["type"] if step["type"] == "NFC" else f"normalizer {json.dumps(step)}")
    for step in _flat(document.get("pre_tokenizer"), "pretokenizers"):
        parts.append(_cut(step))
    if document["model"].get("ignore_merges", False):
        parts.append("whole words first")
    return tuple(parts)


def _flat(step: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


def _cut(step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes by GPT-2's expression" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits one by one"
    if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
        return f"split {step['pattern']['Regex']}"
    return f"pre-tokenizer {json.dumps(step)}"


def _notes(document: Mapping[str, Any], pre: str) -> list[str]:
    """Texts that llama.cpp is known to cut otherwise (seen with llama-cpp-python 0.3.36)."""
    notes = []
    if "NFC" in parts_of(document):
        notes.append("the tokenizer brings texts into Unicode's NFC, which llama.cpp does not: give it such texts")
    if pre == "tekken":
        notes.append("llama.cpp cuts letters with separate combining marks otherwise: give it texts in Unicode's NFC")
    if any(step["type"] == "Metaspace" for step in _flat(document.get("pre_tokenizer"), "pretokenizers")):
        notes.append("llama.cpp puts a space before a text that begins with one, which the tokenizer does not")
    return notes


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id,
    }  # fmt: skip
    return {name: index for name, index in ids.items() if isinstance(index, int)}


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos token before a text, and its eos token behind it.

    Raises: RequestError when it puts other tokens there, which the file can't say.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for add_bos in (False, True):
        for add_eos in (False, True):
            before = [tokenizer.bos_token_id] if add_bos else []
            after = [tokenizer.eos_token_id] if add_eos else []
            if whole == [*before, *plain, *after]:
                return add_bos, add_eos
    raise RequestError(
        f"the tokenizer puts tokens around a text ({whole} for 'a', which is {plain} alone) that are not its bos and "
        "eos, which --to gguf can't say"
    )


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token: SentencePiece joins the pair with the highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks[token]) if token in ranks else -float(len(merges)) for token in tokens]
