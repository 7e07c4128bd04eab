"""Files that build on files, ``--set``, and a recipe written down again."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from potluck.errors import RecipeError
from potluck.recipe import Recipe, load_recipe, recipe_hash, recipe_toml
from potluck.recipe.load import parse_recipe, shareable

Tables = dict[str, Any]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fault(path: Path, *items: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, items)
    return str(error.value)


# --- extends -----------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(
        tmp_path / "shared" / "base.toml",
        """
        name = "base"
        seed = 5
        model = { layers = 1, width = 32, heads = 2, feedforward = 64 }
        [tokenizer]
        kind = "folder"
        path = "tok"
        [local]
        batch_size = 4
        optimizer = { kind = "adamw", learning_rate = 1e-3, beta1 = 0.8 }
        [[participants]]
        name = "ada"
        source = { path = "texts", glob = "*.md" }
        """,
    )


def test_the_later_file_wins_and_the_rest_stays(tmp_path: Path, base: Path) -> None:
    child = 'extends = "../shared/base.toml"\nname = "mine"\n[local.optimizer]\nlearning_rate = 2e-3\n'
    recipe = load_recipe(write(tmp_path / "mine" / "r.toml", child))
    assert (recipe.name, recipe.seed, recipe.local.batch_size) == ("mine", 5, 4)
    assert recipe.local.optimizer.model_dump() | {"learning_rate": 2e-3, "beta1": 0.8} == (
        recipe.local.optimizer.model_dump()
    )


def test_another_kind_starts_afresh(tmp_path: Path, base: Path) -> None:
    child = """
        extends = "base.toml"
        tokenizer = { kind = "bytes" }
        model = { preset = "small" }
        [local]
        optimizer = { kind = "sgd" }
    """
    recipe = load_recipe(write(tmp_path / "shared" / "r.toml", child))
    assert recipe.tokenizer.kind == "bytes"
    assert recipe.model.model_dump() == {"preset": "small"}
    assert recipe.local.optimizer.kind == "sgd" and recipe.local.optimizer.learning_rate == 0.1
    assert recipe.local.batch_size == 4


def test_participants_are_replaced_as_a_whole(tmp_path: Path, base: Path) -> None:
    child = 'extends = "base.toml"\n[[participants]]\nname = "bob"\nsource = { package = "pip" }\n'
    recipe = load_recipe(write(tmp_path / "shared" / "r.toml", child))
    assert recipe.participant_names == ("bob",)


def test_paths_are_relative_to_the_file_that_says_them(tmp_path: Path, base: Path) -> None:
    child = 'extends = "../shared/base.toml"\nmodel = { path = "net" }\n'
    recipe = load_recipe(write(tmp_path / "mine" / "r.toml", child))
    assert Path(recipe.participants[0].source.path).resolve() == base.parent / "texts"
    assert Path(recipe.tokenizer.path).resolve() == base.parent / "tok"
    assert Path(recipe.model.path) == tmp_path / "mine" / "net"


def test_a_hub_id_is_no_path_unless_it_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "r.toml", '[[participants]]\nname = "a"\nsource = { dataset = "wiki" }\n')
    assert load_recipe(path).participants[0].source.dataset == "wiki"
    (tmp_path / "wiki").mkdir()
    assert load_recipe(path).participants[0].source.dataset == str(tmp_path / "wiki")


@pytest.mark.parametrize("ways", [("a.toml", "a.toml"), ("b.toml", "a.toml"), ("../x/b.toml", "../x/a.toml")])
def test_a_circle_is_named(tmp_path: Path, ways: tuple[str, str]) -> None:
    a = write(tmp_path / "x" / "a.toml", f'extends = "{ways[0]}"\n')
    write(tmp_path / "x" / "b.toml", f'extends = "{ways[1]}"\n')
    assert "extends itself" in fault(a)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such recipe"),
        ("seed = ", "not valid TOML"),
        ("\udcff", "cannot be read"),
        ("extends = 3", "extends must be the path of one recipe"),
        ('extends = "gone.toml"', "gone.toml: there is no such recipe"),
        ('extends = "."', "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "r.toml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert said in fault(path)


# --- --set -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("name=other", "name", "other"),
        ('name="2024"', "name", "2024"),
        ("rounds.count = 9", "rounds.count", 9),
        ("local.optimizer={kind='sgd', momentum=0.5}", "local.optimizer.momentum", 0.5),
        ("model.layers=2", "model.layers", 2),
        ("records.keep_best=false", "records.keep_best", False),
        ("participants.1.name=bea", "participants.1.name", "bea"),
        ("records.folder=out/a=b", "records.folder", "out/a=b"),
    ],
)
def test_set_changes_one_key(recipe_file: Path, item: str, key: str, value: Any) -> None:
    before, after = (load_recipe(recipe_file, s).model_dump() for s in ((), (item,)))
    inner: Any = after
    *path, last = key.split(".")
    for part in path:
        inner = inner[int(part) if part.isdigit() else part]
    assert inner[last] == value
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [key.split(".")[0]]


def test_the_last_set_wins_and_they_add_up(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ("rounds.count=5", "local.batch_size=3", "rounds.count=6"))
    assert (recipe.rounds.count, recipe.rounds.local_steps, recipe.local.batch_size) == (6, 2, 3)


def test_set_replaces_one_source_and_leaves_the_others(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = load_recipe(recipe_file).participants
    after = load_recipe(recipe_file, ("participants.2.source={file='here.txt'}",)).participants
    assert after[2].source.file == str(tmp_path / "here.txt")
    assert after[:2] == before[:2] and after[2].name == before[2].name


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("seed", "--set seed: write section.key=value"),
        ("=3", "write section.key=value"),
        ("rounds.=3", "write section.key=value"),
        ("rounds.count=abc", "rounds.count: input should be a valid integer"),
        ("rounds.count=[1]", "rounds.count: input should be a valid integer"),
        ("rounds.cuont=3", "--set rounds.cuont: unknown key; did you mean 'count'?"),
        ("rounds={cuont=3}", "--set rounds.cuont: unknown key; did you mean 'count'?"),
        ("rounds=3", "rounds: "),
        ("rounds.count.x=3", "rounds.count: "),
        ("participants.3.name=x", "participants has items 0 to 2"),
        ("participants.first.name=x", "participants has items 0 to 2"),
        ("participants.0=3", "participants.0: "),
        ("model=tiny", "model: "),
        ("extends=other.toml", "extends: unknown key"),
    ],
)
def test_a_wrong_set_is_a_clear_error(recipe_file: Path, item: str, said: str) -> None:
    found = fault(recipe_file, item)
    assert said in found
    assert str(recipe_file) not in found or not said.startswith("--set")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=some.lists(some.sampled_from(["participants", "0", "9", "model", "source", "name", "data", "split", "rounds",
                                         "count", "local", "optimizer", "kind", ""]), min_size=1, max_size=4),
       value=some.sampled_from(["1", "x", "[]", "{}", "[1]", "{a=1}", "'", "", "nan", "true", "1\nx=2"]))  # fmt: skip
def test_no_set_ends_in_a_trace(recipe_file: Path, key: list[str], value: str) -> None:
    with suppress(RecipeError):
        load_recipe(recipe_file, (f"{'.'.join(key)}={value}",))


# --- written down again ------------------------------------------------------------------------

RICH: Tables = {
    "seed": 2**32 - 1,
    "outer": {"kind": "adam", "epsilon": 1e-9},
    "local": {"sequence_length": 16, "batch_size": 2, "optimizer": {"kind": "muon"},
              "schedule": {"kind": "wsd", "warmup_steps": 1}},
    "rounds": {"count": 2, "local_tokens": 64, "fraction": 1 / 3, "min_contributors": 1},
    "model": {"preset": "35m"},
    "tokenizer": {"kind": "bpe", "vocab_size": 300},
}  # fmt: skip


def profiled(tables: Tables) -> Tables:
    people = [{**p, "profile": {"steps_per_second": 0.1, "availability": 1 / 3}} for p in tables["participants"]]
    return {**tables, "participants": people}


def split(tables: Tables) -> Tables:
    data = {"source": {"jsonl": "/x", "group_field": "g"},
            "split": {"participants": 3, "how": "dirichlet", "alpha": 0.3}}  # fmt: skip
    return {**{k: v for k, v in tables.items() if k != "participants"}, "data": data}


@pytest.mark.parametrize("change", [dict, lambda t: {**t, **RICH}, profiled, split], ids=["plain", "rich", "p", "s"])
def test_a_written_recipe_is_the_same_recipe(tables: Tables, change: Any, tmp_path: Path) -> None:
    recipe = parse_recipe(change(tables))
    again = load_recipe(write(tmp_path / "elsewhere" / "recipe.toml", recipe_toml(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)
    assert recipe_toml(again) == recipe_toml(recipe)


def test_a_file_that_extends_is_written_without_it(recipe_file: Path) -> None:
    child = write(recipe_file.with_name("child.toml"), f'extends = "{recipe_file.name}"\nseed = 3\n')
    assert "extends" not in recipe_toml(load_recipe(child))


# --- hash --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    ["records.folder=x", "records.keep_last=9", "records.checkpoint_every=2", "compute.device=cuda",
     "compute.threads=3", "compute.compile=true", "data.shards=elsewhere", "participants.0.source={path='x'}"],
)  # fmt: skip
def test_where_and_on_what_leave_the_hash(recipe_file: Path, item: str) -> None:
    assert recipe_hash(load_recipe(recipe_file, (item,))) == recipe_hash(load_recipe(recipe_file))


@pytest.mark.parametrize(
    "item",
    ["seed=1", "rounds.count=4", "local.optimizer={kind='adamw', beta2=0.999}", "model.layers=2", "outer={kind='yogi'}",
     "data.validation_bytes=999", "tokenizer={kind='bpe'}", "participants.0.name=bea",
     "participants.0.source={package='x'}", "rounds.on_failure=stop"],
)  # fmt: skip
def test_all_else_changes_the_hash(recipe_file: Path, item: str) -> None:
    assert recipe_hash(load_recipe(recipe_file, (item,))) != recipe_hash(load_recipe(recipe_file))


def test_a_default_that_is_written_out_leaves_the_hash(tables: Tables) -> None:
    written = {**tables, "seed": 0, "outer": {"kind": "sgd"}, "local": {**tables["local"], "clip_norm": 1}}
    assert recipe_hash(parse_recipe(written)) == recipe_hash(parse_recipe(tables))


def test_the_recipes_that_come_with_us_are_recipes() -> None:
    shipped = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
    assert shipped
    for path in shipped:
        recipe = load_recipe(path)
        assert isinstance(recipe, Recipe)
        assert tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)) == recipe_toml(recipe)


def test_a_shared_recipe_names_no_place_of_this_machine() -> None:
    text = recipe_toml(
        parse_recipe(
            {
                "version": 1,
                "model": {"path": "/home/ada/.cache/models--org--tiny/snapshots/12ab"},
                "tokenizer": {"kind": "folder", "path": "/home/ada/tokens"},
                "data": {"shards": "/home/ada/shards"},
                "records": {"folder": "/home/ada/runs/{name}"},
                "participants": [
                    {"name": "ada", "source": {"jsonl": "/home/ada/a.jsonl"}},
                    {"name": "bob", "source": {"dataset": "/home/ada/set"}},
                    {"name": "eve", "source": {"file": "/home/ada/x.txt", "separator": "/page/"}},
                    {"name": "fay", "source": {"dataset": "org/set"}},
                ],
            }
        )
    )
    told = shareable(text)
    assert "/home" not in told
    tables = tomllib.loads(told)
    assert (tables["model"]["path"], tables["tokenizer"]["path"]) == ("org/tiny", "tokens")
    assert (tables["data"]["shards"], tables["records"]["folder"]) == ("shards", "{name}")
    sources = [next(iter(person["source"].values())) for person in tables["participants"]]
    assert sources == ["a.jsonl", "set", "x.txt", "org/set"]
    assert tables["participants"][2]["source"]["separator"] == "/page/"
    assert shareable(told) == told


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model={preset='tiny'}", "model.layers=3"], "model.layers: does not go with model.preset"),
        (["model={preset='tiny', path='x'}"], "model.path: does not go with model.preset"),
        (["engine.heartbeat=3"], "engine.heartbeat: goes with kind = 'nats', not with 'inprocess'"),
        (["local.optimizer.momentum=0.5"], "goes with kind = 'muon', 'sgd', not with 'adamw'"),
        (["batch_size=3"], "batch_size: unknown key; did you mean local.batch_size?"),
        (["local.kind='x'"], "local.kind: unknown key; this table has batch_size"),
        (["rounds.wheels=3"], "rounds.wheels: unknown key; this table has count"),
    ],
)
def test_a_key_out_of_place_is_told_its_place(recipe_file: Path, settings: list[str], says: str) -> None:
    """Never by the key that was written, and not by one that is merely called the same somewhere."""
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, settings)
    assert says in str(error.value)


def test_a_table_without_kind_is_of_the_default_kind(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["local.optimizer.learning_rate=1e-3", "outer.momentum=0.5"])
    assert (recipe.local.optimizer.kind, recipe.local.optimizer.learning_rate) == ("adamw", 1e-3)
    assert (recipe.outer.kind, recipe.outer.momentum) == ("sgd", 0.5)
