# %% [markdown]
# # rankwise as a library
# Every step of `rankwise train`, `evaluate`, `merge` and `generate` as calls. Run the cells in an editor that knows
# `# %%`, or the file as a script: `python examples/notebook.py --data train.jsonl --valid valid.jsonl`.

# %%
from __future__ import annotations

import argparse
import json
from pathlib import Path

import rankwise as rw

parser = argparse.ArgumentParser(description="rankwise as a library, step by step")
parser.add_argument("--model", default="demo", help="a folder, a Hub id, or `demo`")
parser.add_argument("--data", required=True, help="JSONL with prompt and completion")
parser.add_argument("--valid", required=True, help="the same, not trained on")
parser.add_argument("--output", default="runs/notebook")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# %% [markdown]
# ## Train
# A dict is a run file. `on_step` sees each finished step: number, loss, lr, grad_norm, ...

# %%
losses: list[float] = []
summary = rw.train(
    {
        "model": {"name": args.model},
        "adapter": {"r": 16, "lora_alpha": 32},
        "data": {"train": args.data, "valid": args.valid},
        "train": {"steps": args.steps, "batch_size": 8, "lr": 1e-3, "evaluate_every": args.steps},
        "output": args.output,
    },
    on_step=lambda step: losses.append(step.loss),
)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {summary['trainable_parameters']:,} parameters")

# %% [markdown]
# ## Evaluate: base against adapter

# %%
from rankwise.recipes.evaluate import EvaluateConfig, evaluate  # noqa: E402

measured = evaluate(args.output, EvaluateConfig(data=args.valid, rows=32, max_new_tokens=64))
for row in measured["results"]:
    print(row)

# %% [markdown]
# ## Look inside: the model is an ordinary Hugging Face model

# %%
from rankwise.recipes.target import find_target, open_target  # noqa: E402

opened = open_target(find_target(args.output))
model, tokenizer = opened.model, opened.tokenizer
print(type(model).__name__, dict(list(rw.ranks(model).items())[:3]))

# %%
first_row = json.loads(Path(args.valid).read_text(encoding="utf-8").splitlines()[0])
question = [{"role": "user", "content": first_row["prompt"]}]
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = ids.to(model.device)
adapter_answer = model.generate(**ids, max_new_tokens=40, do_sample=False)
with rw.disabled(model):  # the base alone
    base_answer = model.generate(**ids, max_new_tokens=40, do_sample=False)
for name, answer in (("adapter", adapter_answer), ("base", base_answer)):
    print(f"{name}: {tokenizer.decode(answer[0, ids['input_ids'].shape[1] :], skip_special_tokens=True)}")

# %% [markdown]
# ## Save, load, swap in place, take out

# %%
rw.save_adapter(model, Path(args.output) / "copy")
rw.load_adapter(model, Path(args.output) / "copy")
rw.detach(model)  # the plain base again, as it was
rw.load_adapter(model, Path(args.output) / "adapter")

# %% [markdown]
# ## Merge, with a certificate
# `rw.merge(model)` folds the adapter into the model in memory; the recipe also writes the folder, loads it again and
# measures what changed.

# %%
from rankwise.recipes.merge import merge  # noqa: E402

merged = merge(args.output, str(Path(args.output) / "merged"))
print(merged["certificate"])
rw.merge(model)
