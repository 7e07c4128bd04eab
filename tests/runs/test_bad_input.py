"""Whatever is broken: one clear error, its exit code, and the last good state is still there."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from potluck.records.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from tests.conftest import Events, Outcome, Potluck, Tables
    from tests.runs.conftest import Kept


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_error(ended: Outcome, *said: str) -> None:
    """Of an error, one message and what to do, and nothing of our insides."""
    assert sum(line.startswith("error: ") for line in ended.err.splitlines()) == 1
    for words in said:
        assert words in ended.err


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / f"round-{list_checkpoints(folder / 'checkpoints')[-1]:06d}"


# --- checkpoints -------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["shared.safetensors", "participant-eve.safetensors", "outer.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "gone"])
def test_a_damaged_checkpoint(potluck: Potluck, halfway: Path, name: str, damage: Callable[[Path], object]) -> None:
    path = newest(halfway)
    damage(path / name)
    before = tree(halfway)
    one_error(potluck("resume", halfway, code=7), path.name, "damaged", "--round")
    assert tree(halfway) == before


def test_before_a_damaged_checkpoint_there_is_a_good_one(
    potluck: Potluck, kept: Kept, halfway: Path, final_hash: Callable[[Path], str]
) -> None:
    cut(newest(halfway) / "shared.safetensors")
    earlier = list_checkpoints(halfway / "checkpoints")[-2]
    potluck("resume", halfway, "--round", earlier)
    assert final_hash(halfway) == kept.final


def test_a_checkpoint_of_another_recipe(
    potluck: Potluck, kept: Kept, halfway: Path, final_hash: Callable[[Path], str]
) -> None:
    recipe = halfway / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text.replace("learning_rate = 0.7", "learning_rate = 0.8"))
    before = tree(halfway)
    one_error(potluck("resume", halfway, code=9), "another recipe: outer.learning_rate", "is another run")
    assert tree(halfway) == before
    recipe.write_text(text)
    potluck("resume", halfway)
    assert final_hash(halfway) == kept.final


def test_a_recipe_that_changes_only_where_it_computes(
    potluck: Potluck, kept: Kept, halfway: Path, final_hash: Callable[[Path], str]
) -> None:
    recipe = halfway / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("threads = 0", "threads = 1"))
    potluck("resume", halfway)
    assert final_hash(halfway) == kept.final


def test_a_checkpoint_of_another_run(potluck: Potluck, kept: Kept, halfway: Path, recipe_file: Path) -> None:
    """Same model, same text, other recipe: somebody copied the wrong folder."""
    potluck("train", recipe_file, "--set", "records.folder=other")
    shutil.rmtree(halfway / "checkpoints")
    shutil.copytree("other/checkpoints", halfway / "checkpoints")
    one_error(potluck("resume", halfway, code=7), "another recipe")


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "gone"])
def test_an_event_log_shorter_than_the_checkpoint_says(
    potluck: Potluck, halfway: Path, damage: Callable[[Path], object]
) -> None:
    damage(halfway / "events.jsonl")
    before = tree(halfway / "checkpoints")
    one_error(potluck("resume", halfway, code=7), "events.jsonl")
    assert tree(halfway / "checkpoints") == before


# --- text, tokenizer, model --------------------------------------------------------------------


@pytest.fixture
def own_texts(texts: Path, tmp_path: Path, tables: Tables) -> Tables:
    """The recipe with texts that a test may change, and a BPE trained on them."""
    shutil.copytree(texts, tmp_path / "texts")
    people = [{"name": name, "source": {"path": str(tmp_path / "texts" / name)}} for name in ("ada", "bob", "eve")]
    return {**tables, "participants": people, "tokenizer": {"kind": "bpe", "vocab_size": 280}}


def test_text_that_has_changed_since_the_run_began(potluck: Potluck, own_texts: Tables, tmp_path: Path) -> None:
    potluck("train", potluck.recipe(own_texts), "--set", "records.folder=run")
    (tmp_path / "run" / "events.jsonl").write_bytes(
        b"".join(
            line
            for line in (tmp_path / "run" / "events.jsonl").read_bytes().splitlines(True)
            if b"run_finished" not in line
        )
    )
    changed = {path: path.read_text() for path in (tmp_path / "texts" / "bob").iterdir()}
    for path, text in changed.items():
        path.write_text(text.upper())
    before = tree(tmp_path / "run")
    one_error(potluck("resume", "run", code=7), "was made with another", "start a new run")
    assert tree(tmp_path / "run") == before
    potluck("generate", "run", "--prompt", "river", "--max-tokens", 3)
    for path, text in changed.items():
        path.write_text(text)
    potluck("resume", "run")


def test_the_text_of_one_participant_is_gone(potluck: Potluck, own_texts: Tables, tmp_path: Path) -> None:
    recipe = potluck.recipe(own_texts)
    shutil.rmtree(tmp_path / "texts" / "eve")
    one_error(potluck("train", recipe, "--set", "records.folder=run", code=4), "participant eve", "texts/eve")
    assert not (tmp_path / "run" / "run.json").exists()


def test_fewer_tokens_than_a_batch_leave_the_place_free(potluck: Potluck, recipe_file: Path, tmp_path: Path) -> None:
    """What only the tokeniser can know; the corrected recipe then starts in the same folder."""
    few = ("--set", "data.train_bytes=300", "--set", "local.batch_size=30", "--set", "records.folder=run")
    one_error(potluck("train", recipe_file, *few, code=4), "training tokens", "needs 481", "local.batch_size")
    potluck("train", recipe_file, "--set", "records.folder=run")


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_the_tokenizer_of_another_run(
    potluck: Potluck, own_texts: Tables, done: Path, tmp_path: Path, verb: str
) -> None:
    potluck("train", potluck.recipe(own_texts), "--set", "records.folder=other", "--set", "rounds.count=1")
    shutil.rmtree(done / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", done / "tokenizer")
    before = tree(done)
    one_error(potluck(verb, done, code=7), "not the tokenizer this checkpoint was trained with")
    assert tree(done) == before


def test_a_damaged_tokenizer(potluck: Potluck, done: Path) -> None:
    flip(done / "tokenizer" / "tokenizer.json")
    one_error(potluck("generate", done, code=5), "tokenizer")


@pytest.fixture
def model(done: Path) -> Path:
    return done / "model"


def with_value(model: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    potluck: Potluck, tables: Tables, model: Path, tmp_path: Path, value: float
) -> None:
    with_value(model, value)
    recipe = potluck.recipe({k: v for k, v in tables.items() if k != "tokenizer"}, model={"path": str(model)})
    one_error(potluck("train", recipe, "--set", "records.folder=new", code=5), "NaN or infinite", str(model))
    one_error(potluck("generate", model, code=5), "NaN or infinite")


def test_a_model_cut_in_half(potluck: Potluck, model: Path) -> None:
    cut(model / "model.safetensors")
    one_error(potluck("generate", model, code=5), "not a safetensors file, or cut off")


def test_a_preset_that_does_not_exist(potluck: Potluck, recipe_file: Path) -> None:
    ended = potluck("train", recipe_file, "--set", "model={preset='tinny'}", code=3)
    one_error(ended, "did you mean 'tiny'?")


# --- the disk ----------------------------------------------------------------------------------


def no_file_above(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [300, 20_000, 100_000], ids=["log", "state", "moments"])
def test_a_file_that_cannot_be_written(
    potluck: Potluck, kept: Kept, halfway: Path, final_hash: Callable[[Path], str], size: int
) -> None:
    """Writes fail in the middle of a file, as on a full disk: of the log, of the shared state, of the moments."""
    before = tree(halfway / "checkpoints")
    ended = potluck("resume", halfway, code=8, before=no_file_above(size))
    one_error(ended, "cannot be written", "free some space")
    after = tree(halfway / "checkpoints")
    assert {name: after.get(name) for name in before} == before
    potluck("resume", halfway)
    assert final_hash(halfway) == kept.final


def test_a_model_that_cannot_be_written(potluck: Potluck, done: Path) -> None:
    before = tree(done / "model")
    one_error(potluck("export", done, code=8, before=no_file_above(20_000)), "cannot be written")
    assert tree(done / "model") == before
    one_error(potluck("export", done, "--to", "copy", code=8, before=no_file_above(20_000)), "cannot be written")
    potluck("export", done, "--to", "copy")


def test_a_shard_that_cannot_be_written(potluck: Potluck, recipe_file: Path, tmp_path: Path) -> None:
    shards = ("--set", "data.shards=shards", "--set", "records.folder=run")
    one_error(potluck("train", recipe_file, *shards, code=8, before=no_file_above(2000)), "cannot be written")
    assert not [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    potluck("resume" if (tmp_path / "run" / "run.json").exists() else "train",
            *(["run"] if (tmp_path / "run" / "run.json").exists() else [recipe_file, *shards]))  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up(
    potluck: Potluck, kept: Kept, small_disk: Path, final_hash: Callable[[Path], str]
) -> None:
    run = small_disk / "run"
    ended = potluck("train", kept.recipe, "--set", f"records.folder={run}", "--set", "records.keep_last=100", code=8)
    one_error(ended, "cannot be written", os.strerror(errno.ENOSPC), "free some space")
    assert list_checkpoints(run / "checkpoints")
    one_error(potluck("resume", run, code=8), "cannot be written")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    potluck("resume", run)
    assert final_hash(run) == kept.final


# --- the run folder ----------------------------------------------------------------------------


def test_two_runs_in_one_folder(
    potluck: Potluck, kept: Kept, tmp_path: Path, wait_for: Callable[..., None], final_hash: Callable[[Path], str]
) -> None:
    first = potluck.start("train", kept.recipe, "--set", "records.folder=run")
    wait_for(first, tmp_path / "run" / "checkpoints" / "round-000000")
    first.signal(signal.SIGSTOP)  # or it ends before the others have begun, on a machine with much to do
    one_error(potluck("resume", "run", code=9), "another potluck is at work in it")
    one_error(potluck("train", kept.recipe, "--set", "records.folder=run", code=9), "another potluck is at work in it")
    first.signal(signal.SIGCONT)
    assert first.wait().code == 0
    assert final_hash(tmp_path / "run") == kept.final


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_folder_with_a_run_in_it(potluck: Potluck, kept: Kept, done: Path, verb: str) -> None:
    before = tree(done)
    ended = potluck(verb, kept.recipe, "--set", f"records.folder={done}", code=9)
    one_error(ended, "there is a run here already", f"potluck resume {done}")
    assert tree(done) == before


@pytest.mark.parametrize("verb", ["resume", "evaluate", "export", "report"])
@pytest.mark.parametrize("what", ["nothing", "a folder", "a file", "nonsense"])
def test_what_is_not_a_run_folder(potluck: Potluck, tmp_path: Path, verb: str, what: str) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("")
    elif what != "nothing":
        place.mkdir()
    if what == "nonsense":
        (place / "run.json").write_text(json.dumps({"kind": 3}))
    one_error(potluck(verb, place, code=9), str(place))
    assert what != "nothing" or not place.exists()


def test_what_is_neither_a_run_nor_a_model(potluck: Potluck, tmp_path: Path) -> None:
    one_error(potluck("generate", tmp_path, code=5), "not a model folder")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    typo = tmp_path / "runs" / "frist"
    one_error(potluck("generate", typo, code=5), "no such run or model folder", "did you mean", "runs/first")
    for verb in ("report", "status"):
        one_error(potluck(verb, typo, code=9), "there is no such folder", "did you mean", "runs/first")
    for name in ("first", "a", "b", "c", "d", "e"):
        (tmp_path / "runs" / name).mkdir(exist_ok=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    for words in ([], ["--watch"]):
        one_error(potluck("status", tmp_path / "runs", *words, code=9), "it holds runs", "runs/e and 1 more")


def test_a_place_that_cannot_be_written(potluck: Potluck, kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_error(potluck("train", kept.recipe, "--set", "records.folder=file", code=8), "file: cannot be written")


def test_an_export_replaces_nothing_else(
    potluck: Potluck, done: Path, tmp_path: Path, events: Callable[..., Events]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    one_error(potluck("export", done, "--to", "mine", code=8), "mine: there is something here already")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
