"""Encoder-decoder models from a run to PEFT, evaluation, generation and a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from rankwise.attach.checkpoint import load_adapter
from rankwise.cli.main import main
from rankwise.errors import RequestError
from rankwise.evaluate.generate import answer_text, generate_answers
from rankwise.recipes.evaluate import EvaluateConfig, evaluate
from rankwise.recipes.finetune import train
from rankwise.recipes.merge import merge
from tests import tiny
from tests.recipes.runs import metrics, settings
from tests.train.objective_cases import Case

WORDS = ("oak", "pine", "fern", "moss", "lark", "dove")


def to_letter(word: str) -> dict[str, str]:
    return {"prompt": word, "completion": word[0].upper()}


@pytest.fixture(scope="module", params=["t5", "bart"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few words, each with an answer of its own; the random base is trained with the adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    case = Case(tiny.SEQ2SEQ_LMS[request.param], to_letter, chat_template=None)
    case.save_model(folder / "model")
    for name in ("train", "valid"):
        rows = [json.dumps(to_letter(word)) for word in WORDS]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    document = settings(
        folder, folder / "out", adapter={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        train={"objective": "seq2seq", "steps": 60, "batch_size": 6, "micro_batch_size": 6, "lr": 2e-2,
               "max_grad_norm": 1.0, "evaluate_every": 30, "save_every": None},
    )  # fmt: skip
    train(document, quiet=True)
    return folder / "out"


def test_it_learns_and_is_measured_with_its_base(run: Path) -> None:
    lines = metrics(run)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    found = evaluate(str(run), EvaluateConfig(data=str(run.parent / "valid.jsonl"), max_new_tokens=4))
    base, adapter = found["results"]
    assert [base["target"], adapter["target"]] == ["base", "adapter"]
    assert adapter["loss"] < 0.5 * base["loss"] and adapter["exact_match"] > base["exact_match"]


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": tiny.token_ids(), "decoder_input_ids": tiny.token_ids(seed=1)}


def test_peft_loads_it_with_equal_logits(run: Path) -> None:
    theirs = AutoPeftModelForSeq2SeqLM.from_pretrained(str(run / "adapter")).eval()
    ours = load_adapter(AutoModelForSeq2SeqLM.from_pretrained(run.parent / "model"), run / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs()).logits, theirs(**inputs()).logits, rtol=1e-5, atol=1e-5)
        plain = AutoModelForSeq2SeqLM.from_pretrained(run.parent / "model").eval()(**inputs()).logits
    assert float((plain - theirs(**inputs()).logits).abs().max()) > 0.01


def test_merged_it_answers_as_the_adapter_does(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = merge(str(run), str(tmp_path / "merged"), device="cpu")
    assert found["certificate"]["verdict"] == "pass" and found["certificate"]["adapter_effect_kl"] > 1e-3
    answers = []
    for target in (run, tmp_path / "merged"):
        argv = ["generate", str(target), "--prompt", "oak", "--max-new-tokens", "3", "--device", "cpu", "--json"]
        capsys.readouterr()
        assert main([*argv, "--precision", "fp32"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["results"][0]["answer"])
    assert answers[0] == answers[1]


def greedy_by_hand(model: PreTrainedModel, prompt: list[int], num: int, stops: list[int]) -> list[int]:
    written = [model.config.decoder_start_token_id]
    for _ in range(num):
        with torch.no_grad():
            ids = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([written])}
            following = int(model(**ids).logits[0, -1].argmax())
        if following in stops:
            break
        written.append(following)
    return written[1:]


@pytest.mark.parametrize("name", tiny.SEQ2SEQ_LMS)
def test_generation_equals_greedy_decoding_by_hand(name: str) -> None:
    """Each prompt alone, without padding: BART's positions count from the first token."""
    model, tokenizer = tiny.SEQ2SEQ_LMS[name](), tiny.tiny_tokenizer()
    prompts = [tiny.token_ids(1, length, length)[0].tolist() for length in (9, 2, 5)]
    wanted = [answer_text(tokenizer, greedy_by_hand(model, prompt, 6, [258]), [258]) for prompt in prompts]
    assert generate_answers(model, tokenizer, prompts, 6, 3, stop_ids=[258]) == wanted


def test_questions_and_answers_fit_into_positions_by_themselves() -> None:
    model, tokenizer = tiny.bart(), tiny.tiny_tokenizer()
    assert len(generate_answers(model, tokenizer, [[5] * 60], 20, 1)) == 1
    for prompt, tokens in (([5] * 65, 2), ([5], 64)):
        with pytest.raises(RequestError, match="does not fit into the model's 64 positions"):
            generate_answers(model, tokenizer, [prompt], tokens, 1)


@pytest.mark.parametrize(("model", "objective", "remedy"), [("t5", "sft", "seq2seq"), ("llama", "seq2seq", "sft")])
def test_the_other_kind_of_model_is_refused(tmp_path: Path, model: str, objective: str, remedy: str) -> None:
    case = Case({"t5": tiny.t5, "llama": tiny.llama}[model], to_letter, chat_template=None)
    case.save_model(tmp_path / "model")
    for name in ("train", "valid"):
        case.write_rows(tmp_path / f"{name}.jsonl", 3)
    with pytest.raises(RequestError, match=rf"encoder-decoder model.*use train.objective={remedy}"):
        train(settings(tmp_path, tmp_path / "out", train={"objective": objective}), quiet=True)
    assert not (tmp_path / "out").exists()
