"""Loads a model and its tokenizer: a Hub id, a local folder, or one of the embedded models, onto one device.

Weights come from safetensors only; a model's own Python code runs only when the run file asks for it. Nothing is frozen
here: attaching an adapter does that.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rankwise import distributed
from rankwise.errors import RequestError, did_you_mean
from rankwise.models.config import ModelConfig
from rankwise.models.embedded import EMBEDDED, embedded_source
from rankwise.models.hub import is_cut_off
from rankwise.models.labels import Labels
from rankwise.models.quantization import bits_settings, needs_bitsandbytes, settle
from rankwise.models.quiet import quietly

TASKS: dict[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "encoder": transformers.AutoModel,
}
_HEADS = ("classifier", "score", "classification_head", "pre_classifier", "head")
_NEW_HEADS = {
    "sequence-classification": (*_HEADS, "pooler"),
    "token-classification": _HEADS,
    "encoder": ("pooler",),
}
"""Modules that a checkpoint may lack for a task: heads that the task trains anew, or that encoding does not read."""

_NEW: WeakKeyDictionary[PreTrainedModel, tuple[str, ...]] = WeakKeyDictionary()

_PAD_LIKE = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device that `cpu`, `cuda`, `cuda:1`, `mps` or `auto` (CUDA, else MPS, else the CPU) names.

    Of several processes each takes a GPU of its own, and MPS is none: it has no exchange between processes.

    Raises: RequestError when there is no such kind of device, or it is not in this machine.
    """
    there = _devices()
    if distributed.launched_processes() > 1:
        return _own_device(name, there)
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda:0", "mps", "cpu") if kind in there))
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise RequestError(f"model.device '{name}' is not a device{did_you_mean(name, ['auto', 'cpu', 'cuda', 'mps'])}")
    kind, index = match.groups()
    full = f"cuda:{index or 0}" if kind == "cuda" else kind
    if full not in there or (kind != "cuda" and int(index or 0) != 0):
        raise RequestError(f"model.device '{name}' is not available; this machine has {', '.join(there)}")
    return torch.device(full)


def _own_device(name: str, there: list[str]) -> torch.device:
    """The device of this one of several processes."""
    if name not in ("auto", "cpu", "cuda"):
        raise RequestError(
            f"model.device '{name}' can't be shared by {distributed.launched_processes()} processes; set it to cuda "
            "(each process takes a GPU of its own), cpu or auto"
        )
    num_gpus = sum(device.startswith("cuda") for device in there)
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    own = f"cuda:{distributed.local_rank()}"
    if own not in there:
        raise RequestError(
            f"model.device '{name}': process {distributed.local_rank() + 1} of this machine has no GPU of its own, "
            f"there {'is' if num_gpus == 1 else 'are'} {num_gpus}; start --nproc-per-node {max(num_gpus, 1)}, or set "
            "it to cpu"
        )
    return torch.device(own)


def _devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def resolve(name: str) -> str:
    """A local model folder, or a Hub id, for what the run file calls `model.name`.

    Raises: RequestError for a folder that is missing or is not a model, and a name that can be neither.
    """
    if name in EMBEDDED:
        return embedded_source(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            is_adapter = (folder / "adapter_config.json").is_file()
            kind = "an adapter, give the base model instead" if is_adapter else "no model: it has no config.json"
            raise RequestError(f"model.name '{name}' is a folder with {kind}")
        return str(folder)
    if folder.is_file():
        raise RequestError(f"model.name '{name}' is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise RequestError(f"model.name '{name}': there is no such folder")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise RequestError(f"model.name '{name}' is neither a folder nor a Hub id (owner/name)")
    return name


def _source(config: ModelConfig) -> tuple[str, bool]:
    """The model's folder or Hub id, and whether only files that are in the Hub's local cache can be had.

    Raises: RequestError, as `resolve`; for a revision of what has none; for a model that can't be had at all.
    """
    source = resolve(config.name)
    if config.revision is not None and (config.name in EMBEDDED or Path(source).is_dir()):
        kind = "an embedded model" if config.name in EMBEDDED else "a folder"
        raise RequestError(
            f"model.revision ({config.revision}) has no effect: '{config.name}' is {kind}, and only models of the Hub "
            "have revisions; set it to null"
        )
    if Path(source).is_dir():
        return source, False
    with _explained(config):
        return source, is_cut_off(source, config.revision)


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration. Raises: RequestError when it can't be had."""
    source, cut_off = _source(config)
    with quietly(), _explained(config):
        return transformers.AutoConfig.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=cut_off,
        )


def check_task(config: ModelConfig, task: str) -> None:
    """Raises: RequestError for a kind of model that has no head for `task`, before anything else can seem wrong; or as
    `load_config`.
    """
    _check_kind(config.name, task, load_config(config))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right, with a pad token from its own vocabulary.

    Raises: RequestError when there is none, or none of its tokens can serve as padding.
    """
    source, cut_off = _source(config)
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
        raise RequestError(
            f"model '{config.name}' has no tokenizer in its folder; copy tokenizer.json from the original model"
        )
    with quietly(), _explained(config):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, local_files_only=cut_off
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in (*_PAD_LIKE, tokenizer.eos_token) if token in vocabulary), None)
        if pad is None:
            raise RequestError(
                f"the tokenizer of '{config.name}' has neither a pad nor an end token; set pad_token in its files"
            )
        tokenizer.pad_token = pad
    return tokenizer


def load_model(
    config: ModelConfig, dtype: torch.dtype, task: str = "causal-lm", labels: Labels | None = None
) -> PreTrainedModel:
    """The model in evaluation mode, its weights in `dtype`, on the configured device.

    `labels`: of a classifier, written into its config; None leaves those that it has. Heads that its files lack, or
    have for another number of labels, are drawn from torch's global generator (see `new_modules`).

    Raises: RequestError for an unknown task or device, a model that cannot be found or has no such head, weights that
    are not safetensors, lack parts or are damaged, and a model that needs its own code without permission.
    """
    if task not in TASKS:
        raise RequestError(f"task '{task}' is unknown{did_you_mean(task, TASKS)}")
    device = choose_device(config.device)
    source, cut_off = _source(config)
    if Path(source).is_dir():
        _check_weights(config.name, Path(source))
    in_bits = needs_bitsandbytes(config, load_config(config))
    how: dict[str, Any] = {"dtype": dtype}
    if in_bits:  # weights are quantised from the dtype that they have in their file, and the others cast afterwards
        how = {"dtype": "auto", "device_map": {"": device}}
    if config.is_quantized:  # a folder that is stored in bits has settings of its own, which None would hide
        plain = [head.rstrip(".") for head in _NEW_HEADS.get(task, ())]
        how["quantization_config"] = bits_settings(config, dtype, plain)
    with quietly(), _explained(config):
        model, info = TASKS[task].from_pretrained(
            source,
            **how,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=cut_off,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with the name and the shapes
            output_loading_info=True,
            **({} if labels is None else labels.to_config()),
        )
    _NEW[model] = _check_loaded(config.name, task, model, info)
    if in_bits:
        settle(model, dtype)
    return model.to(device).eval()


def new_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules whose weights the files of a model from `load_model` do not hold."""
    return _NEW.get(model, ())


def _check_loaded(name: str, task: str, model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
    """Names of the modules that are new. Raises: RequestError for weights that only the files can have."""
    _check_kind(name, task, model.config)
    new = [key for key in info["missing_keys"] if _is_head(model, task, key)]
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        if _is_head(model, task, key) and task != "encoder":
            new.append(key)
            continue
        raise RequestError(
            f"model '{name}': weight {key} has shape {tuple(stored)} in its file and {tuple(wanted)} by its config.json"
        )
    missing = sorted(key for key in info["missing_keys"] if key not in new)
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise RequestError(
            f"model '{name}' has no weights for {listed}; its files are incomplete, or it is not a {task}"
        )
    return tuple(sorted({key.rpartition(".")[0] for key in new}))


def _is_head(model: PreTrainedModel, task: str, key: str) -> bool:
    """Whether a weight belongs to a part that may be new: at the top of the model, or of its backbone."""
    first = key.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first in _NEW_HEADS.get(task, ())


def _check_kind(name: str, task: str, config: PretrainedConfig) -> None:
    """Raises: RequestError for a kind of model that loads with some head for `task`, but is not meant for it."""
    if task == "seq2seq-lm" and not config.is_encoder_decoder:
        raise RequestError(
            f"model '{name}' ({config.model_type}) is no encoder-decoder model: it reads question and answer as one "
            "text; use train.objective=sft, or choose one such as T5 or BART"
        )
    if task in _NEW_HEADS and config.is_encoder_decoder:
        raise RequestError(
            f"model '{name}' ({config.model_type}) is an encoder-decoder, trained with train.objective=seq2seq only; "
            f"for a {task} choose an encoder or a causal model"
        )
    if task != "causal-lm":
        return
    if config.is_encoder_decoder:
        raise RequestError(
            f"model '{name}' ({config.model_type}) is an encoder-decoder model: its encoder reads the question and its "
            "decoder writes the answer; use train.objective=seq2seq"
        )
    if is_encoder(config):
        raise RequestError(
            f"model '{name}' ({config.model_type}) is an encoder: its positions see the tokens after them, "
            "so it cannot be trained to predict the next one; choose a causal model"
        )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether models of this configuration see the tokens after each position too."""
    is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
    return is_masked and not getattr(config, "is_decoder", False)


def _check_weights(name: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise RequestError(
            f"model '{name}' has only pickled weights ({pickles[0]}), which can run code when loaded; "
            "convert them to safetensors, or use the model's safetensors revision"
        )
    raise RequestError(f"model '{name}' has a config.json but no *.safetensors weights in its folder")


@contextlib.contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    """Turns what transformers and the Hub raise while loading into one line with a remedy."""
    name = config.name
    try:
        yield
    except RequestError:
        raise
    except SafetensorError as error:
        raise RequestError(
            f"the weights of model '{name}' are damaged ({error}); download or copy them again"
        ) from error
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        raise RequestError(_explanation(config, error)) from error


def _explanation(config: ModelConfig, error: Exception) -> str:
    name, text = config.name, str(error)
    chain = list(_causes(error))
    if "trust_remote_code" in text:
        return f"model '{name}' brings its own Python code; if you trust its author, set model.trust_remote_code=true"
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        return f"model '{name}' is gated: accept its terms on the Hub and log in (`hf auth login`)"
    if any(isinstance(cause, RevisionNotFoundError) for cause in chain):
        return f"model '{name}' has no revision '{config.revision}' (model.revision)"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return f"model '{name}' is neither a folder here nor a model on the Hub; check the spelling of model.name"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        version = transformers.__version__
        return f"model '{name}' is of a type that transformers {version} does not know; upgrade transformers"
    if "Unrecognized configuration class" in text:
        found = re.search(r"(\w+)Config'> for this kind of AutoModel: (\w+)", text)
        kind, wanted = found.groups() if found else ("unknown", "model")
        return f"model '{name}' is of type {kind}, which cannot be used as {wanted}; choose another model or task"
    if "safetensors" in text and "does not appear to have" in text:
        return f"model '{name}' has no safetensors weights; use a revision that has (pickled weights are refused)"
    if isinstance(error, ImportError):
        return f"model '{name}' needs a package that is not installed: {text.strip().splitlines()[0]}"
    if Path(name).expanduser().is_dir():
        return f"model folder '{name}' cannot be loaded: {text.strip().splitlines()[0]}"
    if isinstance(error, OSError) or any(isinstance(cause, HfHubHTTPError) for cause in chain):
        return (
            f"model '{name}' is neither a folder here nor in the local Hub cache, and the Hub cannot be reached; "
            f"fetch it once while online (`hf download {name}`), or give a folder"
        )
    return f"model '{name}' cannot be loaded: {text.strip().splitlines()[0]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
