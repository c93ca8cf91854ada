"""The data of a fine-tuning run: read, encoded, and checked against the objective and the model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.data.config import SKIP
from rankwise.data.example import Loaded
from rankwise.data.formats import FORMATS
from rankwise.data.loader import load_rows
from rankwise.data.rows import BadRows, Rows, num_leaked, read_rows
from rankwise.data.templates import stop_token_ids
from rankwise.errors import RequestError
from rankwise.models.load import load_tokenizer
from rankwise.recipes.run import RunConfig
from rankwise.train.needs import NEEDS, remedy_for


@dataclass(frozen=True)
class RunData:
    """Training and validation examples, with the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerBase
    train: Loaded
    valid: Loaded | None
    stop_ids: tuple[int, ...]
    """Tokens that end an answer in the way that the data was written."""
    num_leaked: int = 0
    """Validation rows that are training rows too, letter by letter."""

    @property
    def pad_id(self) -> int:
        """The token that fills padded rows up."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "load_tokenizer gives every tokenizer a pad token"
        return pad_id

    @property
    def tokens_per_epoch(self) -> tuple[int, int]:
        """Tokens of the training set: all, and those that are trained on."""
        examples = self.train.examples
        return sum(len(e.input_ids) for e in examples), sum(e.num_trained for e in examples)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raises: RequestError when a row has more tokens than the model has positions, or a token unknown to it."""
        config = model.config.get_text_config()
        examples = [*self.train.examples, *(self.valid.examples if self.valid else ())]
        longest = max(example.longest for example in examples)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise RequestError(
                f"a row has {longest} tokens, the model {positions} positions; set data.max_length={positions}"
            )
        highest = max(max(example.input_ids) for example in examples)
        if highest >= config.vocab_size:
            raise RequestError(
                f"the tokenizer gives token {highest}, the model's vocabulary ends at {config.vocab_size - 1}; "
                "this tokenizer is not the model's"
            )


def load_data(run: RunConfig) -> RunData:
    """Reads `data.train` and `data.valid`.

    Raises: BadRows with the problems of both; RequestError for files that can't be read, or rows that do not go with
        the objective.
    """
    tokenizer = load_tokenizer(run.model)
    files = {"train": run.data.train, "valid": run.data.valid}
    read: dict[str, Rows] = {}
    loaded: dict[str, Loaded] = {}
    problems = []
    for split, paths in files.items():
        if paths is None:
            continue
        try:
            read[split] = read_rows(paths, run.data.reading)
            if read[split].format and (run.data.on_bad_row == SKIP or not read[split].problems):
                check_objective(run.train.objective, split, read[split].format, read[split].why)
            loaded[split] = load_rows(read[split], paths, tokenizer, run.data, run.train.needs.layout)
        except BadRows as bad:
            problems += bad.problems
    if problems:
        raise BadRows(problems)
    leaked = num_leaked(read["valid"], read["train"]) if "valid" in read else 0
    stop_ids = stop_token_ids(tokenizer, run.data, run.train.needs.layout)
    return RunData(tokenizer, loaded["train"], loaded.get("valid"), stop_ids, leaked)


def check_objective(objective: str, split: str, format: str, why: str) -> None:
    """Raises: RequestError for rows that the objective does not train on; `format` and `why` are as in `Rows`."""
    wanted = NEEDS[objective].rows
    held = next((FORMATS[name].rows for name in format.split(", ") if FORMATS[name].rows != wanted), None)
    if held is not None:
        raise RequestError(
            f"train.objective: {objective} trains on {wanted}, data.{split} holds {held} ({why}); {remedy_for(held)}"
        )
