"""What a recipe may say, and how it says what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from pydantic import BaseModel, ValidationError

from potluck.errors import RecipeError
from potluck.recipe import Recipe
from potluck.recipe.load import parse_recipe, tables_in

Tables = dict[str, Any]

# Fractions, rates and flags without a dimension: every other number says what it counts.
WITHOUT_UNIT = {
    "version", "seed", "learning_rate", "adamw_learning_rate", "epsilon", "weight_decay", "clip_norm", "proximal",
    "alpha", "norm", "max_update_norm", "world_seed",
}  # fmt: skip


def every_table(table: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield table
    for field in table.model_fields.values():
        for inner in tables_in(field.annotation):
            yield from every_table(inner)


EVERY_TABLE = sorted(set(every_table()), key=lambda table: table.__name__)


def without(tables: Tables, *keys: str) -> Tables:
    return {key: value for key, value in tables.items() if key not in keys}


def put(tables: Tables, where: str, value: Any) -> Tables:
    """A copy with ``value`` at ``a.b.c``."""
    changed = copy.deepcopy(tables)
    *path, last = where.split(".")
    inner: Any = changed
    for part in path:
        inner = inner[int(part)] if isinstance(inner, list) else inner.setdefault(part, {})
    inner[last] = value
    return changed


def fault(tables: Tables) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(tables, "my.toml")
    assert error.value.exit_code == 3
    message = str(error.value)
    assert message.startswith("my.toml: ")
    assert error.value.hint
    return message.removeprefix("my.toml: ")


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", EVERY_TABLE, ids=lambda table: table.__name__)
def test_every_key_says_what_it_is(table: type[BaseModel]) -> None:
    assert table.__doc__
    assert table.model_config["frozen"] and table.model_config["extra"] == "forbid"
    for name, field in table.model_fields.items():
        sentence, extra = field.description, field.json_schema_extra
        assert sentence and sentence.endswith(".") and isinstance(extra, dict), name
        counts = any(kind in str(field.annotation) for kind in ("int", "float"))
        if counts and not tables_in(field.annotation):
            assert bool(extra["unit"]) is (name not in WITHOUT_UNIT), name


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("sed", "sed: unknown key; did you mean 'seed'?"),
        ("roundz", "roundz: unknown key; did you mean 'rounds'?"),
        ("rounds.cout", "rounds.cout: unknown key; did you mean 'count'?"),
        ("data.shard", "data.shard: unknown key; did you mean 'shards'?"),
        ("tokenizer.vocab_sice", "tokenizer.vocab_sice: unknown key; this table has kind"),
        ("model.layer", "model.layer: unknown key; did you mean 'layers'?"),
        ("local.batchsize", "local.batchsize: unknown key; did you mean 'batch_size'?"),
        ("local.optimizer.beta3", "local.optimizer.beta3: unknown key; did you mean 'beta2'?"),
        ("local.schedule.warmup", "local.schedule.warmup: unknown key; did you mean 'warmup_steps'?"),
        ("outer.momentun", "outer.momentun: unknown key; did you mean 'momentum'?"),
        ("compute.devise", "compute.devise: unknown key; did you mean 'device'?"),
        ("engine.kinds", "engine.kinds: unknown key; did you mean 'kind'?"),
        ("records.keeplast", "records.keeplast: unknown key; did you mean 'keep_last'?"),
        ("participants.1.nam", "participants.1.nam: unknown key; did you mean 'name'?"),
        ("participants.2.source.glop", "participants.2.source.glop: unknown key; did you mean 'glob'?"),
        (
            "learning_rate",
            "learning_rate: unknown key; did you mean editing.values.learning_rate or local.optimizer.learning_rate or "
            "outer.learning_rate?",
        ),
        ("rounds.batch_size", "rounds.batch_size: unknown key; did you mean local.batch_size?"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(tables: Tables, where: str, said: str) -> None:
    full = {
        **tables,
        "outer": {"kind": "nesterov"},
        "engine": {"kind": "inprocess"},
        "local": {**tables["local"], "optimizer": {"kind": "adamw"}, "schedule": {"kind": "wsd"}},
    }
    assert fault(put(full, where, 1)) == said


@settings(max_examples=60, deadline=None)
@given(table=some.sampled_from(["", "data", "tokenizer", "model", "local", "rounds", "compute", "records"]),
       key=some.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))  # fmt: skip
def test_no_unknown_key_is_let_through(tables: Tables, table: str, key: str) -> None:
    known = set(Recipe.model_fields) | {name for inner in EVERY_TABLE for name in inner.model_fields}
    where = f"{table}.{key}".strip(".")
    if key not in known:
        assert fault(put(tables, where, 1)).startswith(f"{where}: unknown key")


anything = some.recursive(
    some.none() | some.booleans() | some.integers(-3, 3) | some.floats() | some.text(max_size=4),
    lambda inner: (
        some.lists(inner, max_size=2)
        | some.dictionaries(some.sampled_from(["kind", "path", "preset", "name", "source", "package", "x"]), inner)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(where=some.sampled_from(["data", "data.source", "data.split", "tokenizer", "model", "local", "local.optimizer",
                                "local.schedule", "rounds", "outer", "compute", "engine", "records", "participants",
                                "participants.0", "participants.0.source", "participants.0.profile", "seed", "name"]),
       value=anything)  # fmt: skip
def test_whatever_a_key_holds_is_a_recipe_or_a_clear_error(tables: Tables, where: str, value: Any) -> None:
    changed = {**tables, "participants": [value]} if where == "participants.0" else put(tables, where, value)
    with suppress(RecipeError):
        parse_recipe(changed)


# --- alternatives ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("tokenizer", {"kind": "byte"}, "'byte' is not one of 'bytes', 'bpe', 'folder'; did you mean 'bytes'?"),
        ("local.optimizer", {"kind": "adam"}, "'adam' is not one of 'adamw', 'muon', 'sgd'; did you mean 'adamw'?"),
        ("local.schedule", {"kind": "cosin"}, "is not one of 'constant', 'cosine', 'wsd'; did you mean 'cosine'?"),
        ("outer", {"kind": "nestorov"}, "did you mean 'nesterov'?"),
        ("engine", {"kind": "ray"}, "engine"),
        ("rounds.sampling", "unifrom", "did you mean 'uniform'?"),
        ("rounds.on_failure", "halt", "'halt' is not one of 'continue' or 'stop'"),
        ("compute.precision", "fp16", "'fp16' is not one of 'auto', 'fp32' or 'bf16'"),
        ("model", {"preset": "tinny"}, "model.preset: 'tinny' is not one of 'tiny', 'small', '35m' or '125m'"),
        ("model", "tiny", "model: "),
        ("version", 2, "version: 2 is not one of 1"),
        ("participants.0.source", {"pat": "x"}, "a source has exactly one of: path, package, jsonl, file, dataset"),
        ("participants.0.source", {"path": "x", "file": "y"}, "a source has exactly one of"),
        ("participants.0.source", {}, "a source has exactly one of"),
        ("participants.0.source", "texts", "a source has exactly one of"),
    ],
)
def test_a_wrong_alternative_names_the_right_ones(tables: Tables, where: str, value: Any, said: str) -> None:
    message = fault(put(tables, where, value))
    assert message.startswith(where) and said in message


@pytest.mark.parametrize("where", ["tokenizer", "outer", "local.optimizer", "local.schedule"])
def test_an_alternative_without_its_kind_is_the_default(tables: Tables, where: str) -> None:
    assert fault(put(tables, where, {"some_rate": 0.1})).startswith(f"{where}.some_rate: unknown key")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("seed", -1), ("seed", 2**32), ("rounds.count", -1), ("rounds.count", 1.5), ("rounds.fraction", 0.0),
        ("rounds.fraction", 1.1), ("data.validation_fraction", -0.1), ("data.validation_fraction", 1.0),
        ("local.batch_size", 0), ("local.sequence_length", 1), ("local.clip_norm", -1.0), ("outer.learning_rate", 0.0),
        ("outer.learning_rate", float("inf")), ("outer.learning_rate", float("nan")), ("local.proximal", float("inf")),
        ("records.keep_last", 0), ("records.checkpoint_every", 0), ("compute.threads", -1), ("model.layers", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_bounds_is_refused(tables: Tables, where: str, value: float) -> None:
    message = fault(put({**tables, "outer": {"kind": "sgd"}}, where, value))
    assert message.startswith(where) and f"not {value!r}" in message


def test_every_fault_is_named_at_once(tables: Tables) -> None:
    message = fault(put(put(tables, "seed", "x"), "rounds.cout", 3))
    assert "\n  - seed: " in message and "\n  - rounds.cout: " in message


# --- contradictions ----------------------------------------------------------------------------

PROFILE = {"steps_per_second": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "a b"}, "name 'a b': use 1 to 64 letters, digits, '.', '_' or '-'"),
        ({"participants.0.name": "../x"}, "name '../x': use 1 to 64 letters"),
        ({"data.split": {"participants": 2}, "data.source": {"path": "x"}}, "participants and data.split: "),
        ({"participants": []}, "participants: nobody takes part; add [[participants]] or [data.split]"),
        ({"participants.0.name": "bob"}, "participants: 'bob' is named twice"),
        ({"data.source": {"path": "x"}}, "data.source and data.split go together"),
        ({"rounds.local_tokens": 64}, "rounds.local_steps and rounds.local_tokens: give one of them"),
        ({"rounds.local_steps": None, "rounds.local_tokens": 33},
         "rounds.local_tokens 33 is not a multiple of the 32 tokens of one local step"),
        ({"rounds.participants_per_round": 2, "rounds.fraction": 0.5}, "rounds.participants_per_round and "),
        ({"rounds.participants_per_round": 4},
         "rounds.participants_per_round 4: there are only 3 participants"),
        ({"rounds.participants_per_round": 1, "rounds.min_contributors": 2},
         "rounds.min_contributors 2: only 1 are asked each round"),
        ({"local.schedule": {"kind": "cosine", "warmup_steps": 6}},
         "local.schedule.warmup_steps 6: the run has only 6 local steps"),
        ({"participants.0.profile": PROFILE}, "participants.profile: give every participant a profile or none"),
        ({"model.heads": 3}, "model: width 32 must split into 3 heads of even size"),
        ({"model.kv_heads": 3}, "model: kv_heads 3 must divide heads 2"),
    ],
)  # fmt: skip
def test_a_contradiction_has_its_sentence(tables: Tables, changes: Tables, said: str) -> None:
    for where, value in changes.items():
        tables = put(tables, where, value)
    assert fault(tables).startswith(said)


@pytest.mark.parametrize("split", [{"how": "dirichlet"}, {"how": "iid", "alpha": 1.0}])
def test_alpha_goes_with_dirichlet(tables: Tables, split: Tables) -> None:
    data = {"source": {"path": "x"}, "split": {"participants": 2, **split}}
    message = fault({**without(tables, "participants"), "data": data})
    assert message == 'data.split: alpha goes with how = "dirichlet", and only with it'


# --- what follows from it ----------------------------------------------------------------------


def test_a_recipe_is_frozen(tables: Tables) -> None:
    recipe = parse_recipe(tables)
    for table, key in ((recipe, "seed"), (recipe.rounds, "count"), (recipe.participants[0], "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, 3)


def test_figures_that_follow(tables: Tables) -> None:
    tables = put(tables, "local.accumulation", 3)
    recipe = parse_recipe({**tables, "rounds": {"count": 5, "local_tokens": 192, "fraction": 0.5}})
    assert recipe.tokens_per_step == 2 * 3 * 16
    assert (recipe.local_steps, recipe.total_local_steps) == (2, 10)
    assert (recipe.asked_per_round, recipe.min_contributors) == (2, 1)


def test_the_names_of_a_split_sort_as_they_count(tables: Tables) -> None:
    data = {"source": {"path": "x"}, "split": {"participants": 11}}
    names = parse_recipe({**without(tables, "participants"), "data": data}).participant_names
    assert names[0] == "p00" and names[-1] == "p10" and list(names) == sorted(names)


def test_a_model_folder_brings_its_tokenizer(tables: Tables) -> None:
    model = {"model": {"path": "/m"}}
    recipe = parse_recipe({**without(tables, "tokenizer"), **model})
    assert recipe.tokenizer.kind == "folder" and recipe.tokenizer.path == "/m"
    assert parse_recipe({**tables, **model}).tokenizer.kind == "bytes"
