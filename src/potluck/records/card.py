"""The model card of an exported model: what Hugging Face shows as README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from potluck.records.curves import HeldOut, RunRecord
from potluck.records.units import bytes_text, count_text, one_line
from potluck.untrusted import loads_toml

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 60
# What begins something in Markdown or HTML; an underscore inside a word does not.
_MARKS = re.compile(r"[\\`*\[\]<>|&~$#!]|(?<![^\W_])_|_(?![^\W_])")
_VARIANTS = {
    "together": "trained by {count} participants, each on its own text, by combining their weight updates",
    "alone": "trained by one participant on its own text",
    "pooled": "trained on the text of all participants pooled in one place, as a yardstick",
}


def model_card(
    record: RunRecord, recipe_toml: str, base_model: str | None = None, frozen: int = 0, ours: bool = False
) -> str:
    """README.md for the exported folder of a run.

    Args:
        record: The run, from `read_run`.
        recipe_toml: The resolved recipe.
        base_model: Name of the model that training started from, if it did not start at random.
        frozen: Parameters of the model that were not trained.
        ours: It is of a class of ours (`potluck.models.register`), which transformers must be told of.
    """
    how = _VARIANTS.get(record.variant, record.variant).format(count=len(record.trainers))
    sections = [
        _front_matter(base_model),
        f"# {_data(record.name)}",
        f"A causal language model of {count_text(record.parameters)} parameters"
        + (f" beside {count_text(frozen)} frozen ones" if frozen else "")
        + f", {how}, with potluck {record.potluck}. It was trained on {count_text(record.total_tokens)} tokens in "
        f"{len(record.rounds)} of {record.planned_rounds} rounds"
        + (f" and started from {_data(base_model)}." if base_model else "."),
        _load(ours),
        _participants(record),
        _held_out(record),
        _limits(record, recipe_toml),
        _recipe(record, recipe_toml),
        _versions(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(base_model: str | None) -> str:
    base = f"base_model: {json.dumps(base_model)}\n" if base_model else ""  # a JSON string is a YAML string
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags:\n- potluck\n- federated\n---"


def _load(ours: bool) -> str:
    begin = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    if ours:
        begin = f"from potluck.models.register import register\n{begin}register()\n"
    return (
        f"## Use\n\n```python\n{begin}"
        'folder = "."  # this folder, or its name on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)\n'
        "print(tokenizer.decode(tokens[0]))\n```"
    )


def _participants(record: RunRecord) -> str:
    trained: dict[str, int] = {}
    for item in record.contributions:
        trained[item.participant] = trained.get(item.participant, 0) + item.tokens
    held = [item for item in record.participants if record.variant == "pooled" or item.name in record.trainers]
    rows = [
        (_data(item.name), f"{item.train_documents:,}", bytes_text(item.train_bytes), count_text(item.train_tokens))
        + ((count_text(trained[item.name]),) if item.name in trained else ("-",))
        for item in held
    ]
    head = ("participant", "documents", "text", "tokens held", "tokens trained")
    return "## Participants\n\n" + _table(head, rows)


def _held_out(record: RunRecord) -> str:
    if not record.evaluations:
        return ""
    last = record.evaluations[-1]
    rows = [(_data(name), *_measures(value)) for name, value in last.participants.items()]
    if last.union:
        rows.append(("**all of these**" if last.missing else "**all**", *_measures(last.union)))
    known = record.union_curve
    line = ""
    if len(known) > 1:
        line = f"\n\nOver the run: `{_sparkline(known)}` from {known[0]:.3f} to {known[-1]:.3f} bits per byte."
    table = _table(("held-out text of", "bytes", "bits per byte"), rows)
    without = f" Not measured: {', '.join(map(_data, last.missing))}." if last.missing else ""
    return f"## Held-out text\n\nAfter round {last.round}; lower is better.{without}\n\n{table}{line}"


def _measures(value: HeldOut) -> tuple[str, str]:
    return f"{value.bytes:,}", "-" if value.bits_per_byte is None else f"{value.bits_per_byte:.3f}"


def _limits(record: RunRecord, recipe_toml: str) -> str:
    tokenizer = _tables(recipe_toml).get("tokenizer")
    joint = isinstance(tokenizer, dict) and tokenizer.get("kind") == "bpe" and record.variant != "pooled"
    return (
        "## Limits\n\n"
        f"It knows what {count_text(record.total_tokens)} training tokens of the text above can teach"
        " and was not tuned to follow instructions or to be safe. It may reproduce passages of its training text,"
        " and potluck says nothing about the licence of that text."
        + (" The tokenizer was trained on all participants' training text, read in one place." if joint else "")
    )


def command_of(variant: str, recipe_toml: str) -> str:
    """The command that trains what a run of a recipe trained."""
    if variant != "together":  # its recipe was made of that of all together
        return "potluck compare recipe.toml"
    engine = _tables(recipe_toml).get("engine")
    hosted = isinstance(engine, dict) and engine.get("kind") == "nats"
    return "potluck host recipe.toml" if hosted else "potluck train recipe.toml"


def _tables(recipe_toml: str) -> dict[str, Any]:
    try:
        return loads_toml(recipe_toml)
    except ValueError:
        return {}


def _recipe(record: RunRecord, recipe_toml: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", recipe_toml)), default=0)
    fence = "`" * max(3, longest + 1)
    block = f"{fence}toml\n{recipe_toml.strip()}\n{fence}"
    command = command_of(record.variant, recipe_toml)
    how = {
        "potluck train recipe.toml": f"`{command}` with this recipe trains it.",
        "potluck host recipe.toml": f"`{command}` with this recipe trains it, with everybody's `potluck join`.",
    }.get(command, f"`{command}` trains it, with the recipe of the run together. This is the one it was given.")
    return f"## Recipe\n\n{how}\n\n{block}"


def _versions(record: RunRecord) -> str:
    rows = [("potluck", record.potluck), *((key, str(value)) for key, value in record.environment.items())]
    rows += [("recipe hash", record.recipe_hash), ("state hash", record.state_hash or "not finished")]
    return "## Versions\n\n" + _table(("", ""), [(_data(key), _data(value)) for key, value in rows])


def _sparkline(values: Sequence[float]) -> str:
    step = -(-len(values) // _MOST_POINTS)
    shown = [*values[:-1:step], values[-1]]
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in shown)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _data(text: str) -> str:
    """A name or a value as it is, whatever Markdown would make of it."""
    return _MARKS.sub(r"\\\g<0>", one_line(text))
