"""What ``potluck check`` knows before anything slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potluck.errors import CorpusError, ModelError, PotluckError, RecipeError, StorageError
from potluck.preflight import Forecast, forecast
from potluck.recipe.load import parse_recipe

Tables = dict[str, Any]


def check(tables: Tables, **changes: Any) -> Forecast:
    return forecast(parse_recipe({**tables, **changes}))


def with_source(tables: Tables, source: Tables) -> Tables:
    return {"participants": [*tables["participants"][:2], {"name": "eve", "source": source}]}


def test_what_a_run_costs(tables: Tables, texts: Path) -> None:
    expected = check(tables, rounds={"count": 3, "local_steps": 2, "participants_per_round": 2})
    assert expected.participants == ("ada", "bob", "eve")
    ada = expected.texts["ada"]
    assert ada is not None and 800 < ada["validation_bytes"] <= 1000 < ada["train_bytes"]
    assert ada["train_tokens"] == ada["train_bytes"] + ada["train_documents"]
    assert expected.epochs == pytest.approx(
        3 * 2 / 3 * 2 * 32 / min(t["train_tokens"] for t in expected.texts.values() if t)
    )
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert expected.parameters == 257 * 32 + layer + 32
    assert (expected.tokens_per_step, expected.tokens_per_round, expected.total_tokens) == (32, 128, 384)
    assert 0 < expected.update_bytes - 4 * expected.parameters < 600
    assert expected.download_bytes == expected.peak_download_bytes >= 4 * expected.parameters
    assert expected.participant_bytes == 8 * expected.parameters
    assert expected.coordinator_bytes == 8 * expected.parameters
    assert expected.warnings == ()


ELSEWHERE = {"participants": [{"name": "ada"}, {"name": "bob"}], "engine": {"kind": "nats"}}
SPARSE = [{"kind": "error-feedback"}, {"kind": "block-top-k"}, {"kind": "quantize", "bits": 2}]
DEEP = {"layers": 3, "width": 32, "heads": 2, "feedforward": 64, "context": 64}
STREAMING = {"kind": "streaming", "fragments": 4, "overlap": 1}


@pytest.mark.parametrize(
    ("changes", "participant", "coordinator"),
    [
        ({"updates": {"links": [{"kind": "quantize"}]}}, 2, 2),
        ({"updates": {"links": SPARSE}, "rounds": {"count": 60}}, 3, 2),
        ({"updates": {"download": {"kind": "quantized"}}}, 3, 3),
        ({"rounds": {"streaming": STREAMING, "count": 9}, "model": DEEP}, 4, 2),
        ({"rounds": {"streaming": {"kind": "eager"}}}, 3, 2),
        ({"outer": {"kind": "sign"}}, 2, 2),
        ({"outer": {"kind": "sgd", "momentum": 0.5}}, 2, 3),
    ],
    ids=str,
)
def test_what_is_kept_in_host_memory(tables: Tables, changes: Tables, participant: int, coordinator: int) -> None:
    expected = check(tables, **changes)
    vector, history = 4 * expected.parameters, 0
    if expected.download_bytes < vector and "updates" in changes:
        history = round(4 * vector * (1 / 4 + 1 / 256))
    assert expected.participant_bytes == participant * vector
    assert expected.coordinator_bytes == pytest.approx(coordinator * vector + history, rel=0.001)


def test_the_process_holds_all_of_it(tables: Tables) -> None:
    """Weights twice, gradients, one vector of an exchange, and everybody's state, beside the interpreter."""
    wide = {**DEEP, "width": 512, "feedforward": 1024}
    plain, plus = check(tables, model=wide), check(tables, model=wide, outer={"kind": "sgd", "momentum": 0.5})
    vector = 4 * plain.parameters
    assert plain.process_bytes is not None and plus.process_bytes is not None
    held = plain.process_bytes - 4 * vector - 3 * plain.participant_bytes - plain.coordinator_bytes
    assert 0.4e9 < held < 0.6e9
    assert plus.process_bytes - plain.process_bytes == vector
    assert check(tables, **ELSEWHERE).process_bytes is None


@pytest.mark.parametrize(
    "changes",
    [
        {"local": {"batch_size": 64, "sequence_length": 64}},
        {"data": {"validation_fraction": 0.5}},
    ],
    ids=str,
)
def test_what_passes_is_counted(tables: Tables, texts: Path, changes: Tables) -> None:
    """A larger step and more text to evaluate each need more than the same run without."""
    (texts / "ada" / "long.txt").write_text("word " * 60_000)
    try:
        wide = {**DEEP, "width": 256, "feedforward": 512}
        less, more = check(tables, model=wide).process_bytes, check(tables, model=wide, **changes).process_bytes
    finally:
        (texts / "ada" / "long.txt").unlink()
    assert less is not None and more is not None and more > less


def test_what_an_exchange_makes_is_counted(tables: Tables) -> None:
    """Where the exchange is the peak: a model that is large beside a step's and an evaluation's few tokens."""
    wide = {**DEEP, "width": 512, "feedforward": 1024}
    less, more = check(tables, model=wide), check(tables, model=wide, updates={"links": [{"kind": "quantize"}]})
    assert less.process_bytes is not None and more.process_bytes is not None
    assert more.process_bytes > less.process_bytes


def test_large_checkpoints_come_rarely(tables: Tables) -> None:
    small, large = check(tables), check(tables, model={"preset": "125m"})
    assert (small.checkpoint_every, small.checkpoint_bytes) == (1, 4 * small.parameters * (1 + 3 * 2))
    assert large.checkpoint_every == -(-large.checkpoint_bytes // 500_000_000) > 4
    assert large.disk_bytes == 3 * large.checkpoint_bytes + 8 * large.parameters
    assert check(tables, model={"preset": "125m"}, records={"checkpoint_every": 1}).checkpoint_every == 1
    hosted = check(tables, **ELSEWHERE)
    assert hosted.checkpoint_bytes == 4 * hosted.parameters


def test_a_checkpoint_without_room(tables: Tables) -> None:
    huge = {"layers": 1000, "width": 65_536, "heads": 128, "feedforward": 262_144, "context": 64}
    with pytest.raises(StorageError, match="the first checkpoint has"):
        check(tables, model=huge)


def test_evaluations_are_bounded_and_counted(tables: Tables, tmp_path: Path) -> None:
    """Steps as many as by default: an evaluation is less work than the round before it."""
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"{number} " + "word " * 400)
    people = [{"name": "eve", "source": {"path": str(tmp_path)}}]
    changes = {"participants": people, "data": {"shards": tables["data"]["shards"]}, "rounds": {}, "local": {}}
    model = {**DEEP, "context": 128}
    expected, text = check(tables, model=model, **changes), check(tables, model=model, **changes).texts["eve"]
    assert text is not None and 30_000 < text["validation_bytes"] <= 32_768
    assert expected.evaluation_tokens == text["validation_tokens"]
    assert expected.evaluation_share == pytest.approx(11 * text["validation_tokens"] / 3 / expected.total_tokens)
    assert 0.4 < expected.evaluation_share < 0.6
    dear = check(tables, model=model, **{**changes, "rounds": {"count": 1000, "local_steps": 5}})
    assert any("rounds.evaluate_every = 3" in warning for warning in dear.warnings)


def test_a_model_folder_is_opened_once(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from potluck.models import check as checks
    from potluck.models.build import build_model

    build_model(parse_recipe(tables).model, 257, 256, 0).save_pretrained(tmp_path)
    opened: list[Path] = []
    once = checks.checked_folder
    monkeypatch.setattr(checks, "checked_folder", lambda folder: (opened.append(folder), once(folder))[1])
    expected = check(tables, model={"path": str(tmp_path)})
    assert opened == [tmp_path] and expected.parameters == check(tables).parameters


def test_a_tokenizer_that_the_model_does_not_know(tables: Tables, tmp_path: Path) -> None:
    from potluck.models.build import build_model

    build_model(parse_recipe(tables).model, 200, 199, 0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the model knows 200 tokens, the tokenizer has 257"):
        check(tables, model={"path": str(tmp_path)})


def test_how_many_tokens_a_bpe_gets(tables: Tables) -> None:
    asked = check(tables, tokenizer={"kind": "bpe", "vocab_size": 300})
    assert (asked.vocabulary_size, asked.vocabulary_is_bound, asked.warnings) == (300, False, ())
    filled = check(tables, tokenizer={"kind": "bpe", "vocab_size": 30_000})
    assert 300 < filled.vocabulary_size < 1000 and "no more than" in filled.warnings[0]
    elsewhere = check(tables, tokenizer={"kind": "bpe", "vocab_size": 30_000}, **ELSEWHERE)
    assert (elsewhere.vocabulary_size, elsewhere.vocabulary_is_bound) == (30_000, True)


def test_fragments_divide_what_a_round_sends(tables: Tables) -> None:
    whole, parts = check(tables, model=DEEP), check(tables, model=DEEP, rounds={"streaming": STREAMING, "count": 8})
    assert parts.update_bytes == pytest.approx(whole.update_bytes / 4, rel=0.02)
    assert parts.download_bytes == pytest.approx(whole.download_bytes / 4, rel=0.02)
    assert whole.update_bytes / 4 < parts.peak_update_bytes < whole.update_bytes / 3


def test_more_fragments_than_layers(tables: Tables) -> None:
    with pytest.raises(RecipeError, match=r"rounds.streaming.fragments: 4 fragments need .* 3 layers; the model has 1"):
        check(tables, rounds={"streaming": STREAMING})


@pytest.mark.parametrize(
    ("updates", "outer", "bound"),
    [
        ({"links": SPARSE, "download": {"kind": "delta"}}, {"kind": "sgd"}, True),
        ({"links": SPARSE, "download": {"kind": "delta"}}, {"kind": "nesterov"}, False),
        ({"links": SPARSE}, {"kind": "sgd"}, False),
        ({"download": {"kind": "delta"}}, {"kind": "sgd"}, False),
    ],
    ids=str,
)
def test_differences_are_small_only_where_few_entries_change(
    tables: Tables, updates: Tables, outer: Tables, bound: bool
) -> None:
    expected = check(tables, updates=updates, outer=outer)
    assert expected.download_is_bound == bound
    size = expected.parameters
    kept = 64 * (size // 4096) + -(-64 * (size % 4096) // 4096)
    down = size / 8 + 4 * 3 * kept if bound else 4 * size
    assert expected.download_bytes == pytest.approx(down, abs=600)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": {"sampling": "uniform"}}, "rounds.sampling has no effect: everybody is asked each round"),
        ({"rounds": {"count": 3, "evaluate_every": 4}}, "rounds.evaluate_every 4: only the first state and the last"),
        ({"records": {"checkpoint_every": 11}}, "records.checkpoint_every 11: only the first state and the last"),
        ({"outer": {"kind": "nesterov"}}, "plain averaging"),
        ({"rounds": {"count": 1000}}, "learnt by heart"),
        ({"local": {"keep_optimizer": False, "optimizer": {"kind": "sgd"}}}, "local.keep_optimizer has no effect"),
        ({"updates": {"links": [{"kind": "top-k"}]}}, "top-k without error-feedback"),
        ({"updates": {"links": [{"kind": "sign"}]}}, "sign without error-feedback"),
        ({"updates": {"links": SPARSE}}, "block-top-k and quantize to 2 bits over 3 outer steps: error feedback may"),
        ({"updates": {"download": {"kind": "delta"}}}, "saves nothing: every parameter changes"),
        ({"rounds": {"streaming": {"kind": "streaming", "fragments": 1, "overlap": 0}}}, "saves nothing; leave it out"),
    ],
)
def test_a_setting_without_effect_is_warned_of(tables: Tables, changes: Tables, said: str) -> None:
    local = {**tables["local"], **changes.pop("local", {})}
    (warning,) = check(tables, local=local, **changes).warnings
    assert said in warning


def test_a_name_that_compare_will_refuse_is_warned_of(tables: Tables) -> None:
    people = [{**tables["participants"][0], "name": "pooled"}, *tables["participants"][1:]]
    (warning,) = check(tables, participants=people).warnings
    assert "'pooled'" in warning


def test_a_split_among_one_is_warned_of(tables: Tables, texts: Path) -> None:
    data = {"source": {"path": str(texts)}, "split": {"participants": 1}}
    (warning,) = check({k: v for k, v in tables.items() if k != "participants"}, data=data).warnings
    assert "divides nothing" in warning


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "/nowhere"}, "path /nowhere: there is no such file or folder"),
        ({"file": "/nowhere.txt"}, "file /nowhere.txt: there is no such"),
        ({"jsonl": "/nowhere.jsonl"}, "jsonl /nowhere.jsonl: there is no such"),
        ({"package": "no_such_package"}, "not installed"),
        ({"path": "EMPTY"}, "holds no text"),
        ({"path": "TEXTS", "glob": "*.md"}, "holds no text"),
    ],
)
def test_a_source_that_is_missing_or_empty(
    tables: Tables, texts: Path, tmp_path: Path, source: Tables, said: str
) -> None:
    places = {"EMPTY": str(tmp_path), "TEXTS": str(texts)}
    source = {key: places.get(value, value) for key, value in source.items()}
    with pytest.raises(CorpusError, match="participant eve: ") as error:
        check(tables, **with_source(tables, source))
    assert said in str(error.value)


def test_less_text_than_a_batch(tables: Tables, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 31)
    with pytest.raises(CorpusError, match=r"has 26 training tokens in 1 documents and needs 33") as error:
        check(tables, **with_source(tables, {"path": str(tmp_path)}))
    assert "local.batch_size" in error.value.hint


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"local": {"sequence_length": 65}}, RecipeError, "sequence_length 65: the model's context is 64 tokens"),
        ({"model": {"path": "/nowhere"}}, ModelError, "/nowhere"),
        ({"tokenizer": {"kind": "folder", "path": "/nowhere"}}, ModelError, "/nowhere"),
    ],
)
def test_what_does_not_fit_the_model(tables: Tables, changes: Tables, kind: type[PotluckError], said: str) -> None:
    with pytest.raises(kind) as error:
        check(tables, **changes)
    assert said in str(error.value)
