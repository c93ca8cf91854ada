"""Shared fixtures: no network, one thread for each worker, tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import tiny
from tests.processes import Processes


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(params=sorted(tiny.CAUSAL_LMS))
def causal_lm(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny model of each causal family."""
    return tiny.CAUSAL_LMS[request.param]()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny.llama()


@pytest.fixture
def model_folder(tmp_path, llama, tokenizer) -> str:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def two_processes() -> Iterator[Processes]:
    """Called with a function and its arguments, gives its results in two processes that have met."""
    processes = Processes(2)
    yield processes
    processes.stop()
