"""The same recipe gives the same run, whatever comes between."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from potluck.errors import NotFinite
from potluck.records.checkpoint import list_checkpoints, load_checkpoint

if TYPE_CHECKING:
    from tests.conftest import Events, Potluck, Tables
    from tests.runs.conftest import Kept

Story = Callable[[Path], Any]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a run's numbers are in."""
    wanted = [folder / "events.jsonl", folder / "recipe.toml", *(folder / "checkpoints").rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in wanted if path.is_file()}


def test_the_same_recipe_twice_writes_the_same_events(
    potluck: Potluck, kept: Kept, events: Callable[..., Events], tmp_path: Path
) -> None:
    potluck("train", kept.recipe, "--set", f"records.folder={tmp_path / 'again'}")
    assert events(tmp_path / "again") == events(kept.undisturbed)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    potluck: Potluck, kept: Kept, halfway: Path, final_hash: Callable[[Path], str], story: Story
) -> None:
    reached = list_checkpoints(halfway / "checkpoints")[-1]
    assert 3 <= reached < 8
    potluck("resume", halfway)
    assert final_hash(halfway) == kept.final
    assert story(halfway) == story(kept.undisturbed)


def test_the_state_of_who_was_not_asked_is_not_written_again(kept: Kept) -> None:
    saved = [*(kept.undisturbed / "checkpoints").glob("round-*/participant-*.safetensors")]
    assert len(saved) == 9 and len({path.stat().st_ino for path in saved}) < 9


def test_a_finished_run_is_left_as_it_is(potluck: Potluck, done: Path) -> None:
    before = contents(done)
    result = potluck("resume", done, "--json").result
    assert result["rounds"] == 8
    assert contents(done) == before


def test_an_export_that_a_kill_prevented_is_made_up_for(potluck: Potluck, done: Path) -> None:
    shutil.rmtree(done / "model")
    (done / "report.json").unlink()
    potluck("resume", done)
    assert (done / "model" / "model.safetensors").exists() and (done / "report.json").exists()


def test_resume_from_an_earlier_round(
    potluck: Potluck, kept: Kept, done: Path, final_hash: Callable[[Path], str], story: Story
) -> None:
    assert list_checkpoints(done / "checkpoints") == [6, 7, 8]
    potluck("resume", done, "--round", 6)
    assert final_hash(done) == kept.final
    assert story(done) == story(kept.undisturbed)
    assert list_checkpoints(done / "checkpoints") == [6, 7, 8]


def test_killed_after_a_step_back(
    potluck: Potluck, kept: Kept, done: Path, final_hash: Callable[[Path], str], story: Story
) -> None:
    """What lies after the round that was chosen is no longer part of the run."""

    def die_after_the_step_back() -> None:
        import os

        from potluck import run

        run.run_rounds = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert potluck.start("resume", done, "--round", 6, before=die_after_the_step_back).wait().code == -signal.SIGKILL
    assert list_checkpoints(done / "checkpoints") == [6]
    potluck("resume", done)
    assert final_hash(done) == kept.final
    assert story(done) == story(kept.undisturbed)


def test_a_round_without_a_checkpoint(potluck: Potluck, done: Path) -> None:
    before = contents(done)
    ended = potluck("resume", done, "--round", 2, code=7)
    assert "no checkpoint of round 2" in ended.err and "6, 7, 8" in ended.err
    assert contents(done) == before


SPARSE = [
    {"kind": "error-feedback", "decay": 0.9},
    {"kind": "block-top-k", "k": 8, "block": 64},
    {"kind": "quantize", "bits": 2, "block": 8},
]
LOW_RANK = [{"kind": "error-feedback"}, {"kind": "low-rank", "rank": 1}]
REMEMBERED: dict[str, dict[str, Any]] = {
    "residual and quantised download": {"updates": {"links": SPARSE, "download": {"kind": "quantized", "bits": 4}}},
    "streaming, low rank, differences": {
        "rounds": {"count": 6, "local_steps": 2, "streaming": {"kind": "streaming", "fragments": 2, "overlap": 1}},
        "updates": {"links": LOW_RANK, "download": {"kind": "delta"}},
    },
    "eager": {"rounds": {"count": 6, "local_steps": 2, "streaming": {"kind": "eager"}}},
    "growing batches": {"local": {"adaptive_batch": {"threshold": 0.2, "streams": 2, "merge_every": 3}}},
}


@pytest.mark.parametrize("changed", REMEMBERED.values(), ids=REMEMBERED)
def test_what_is_kept_between_rounds_is_in_the_checkpoint(
    potluck: Potluck, tables: Tables, tmp_path: Path, final_hash: Callable[[Path], str], story: Story,
    changed: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    rounds = {"count": 6, "local_steps": 2}
    wide = {**tables, "rounds": rounds, "records": {"keep_last": 9, "folder": "run"}, **changed}
    wide["local"] = {**tables["local"], **changed.get("local", {})}
    potluck("train", potluck.recipe(wide))
    final, told = final_hash(tmp_path / "run"), story(tmp_path / "run")
    potluck("resume", tmp_path / "run", "--round", 3)
    assert final_hash(tmp_path / "run") == final and story(tmp_path / "run") == told


# --- a participant that fails -----------------------------------------------------------------


def failing(name: str, revision: int) -> Callable[[], None]:
    """Make a participant fail in one round."""

    def patch() -> None:
        from potluck import participant

        train = participant._TASKS["train"]

        def fails(who: Any, task: Any, shared: Any) -> Any:
            if (who.name, task.revision) == (name, revision):
                raise NotFinite("loss nan")
            return train(who, task, shared)

        participant._TASKS["train"] = fails  # type: ignore[index]

    return patch


def test_a_failure_is_reported_and_the_run_goes_on(
    potluck: Potluck, recipe_file: Path, tmp_path: Path, events: Callable[..., Events]
) -> None:
    ended = potluck("train", recipe_file, "--set", "records.folder=run", before=failing("bob", 1))
    assert "bob failed: loss nan" in ended.err
    failed = [e for e in events(tmp_path / "run", "contribution") if e["status"] != "ok"]
    assert [(e["round"], e["participant"], e["reason"]) for e in failed] == [(2, "bob", "loss nan")]
    assert "loss" not in failed[0]
    assert [e["contributors"] for e in events(tmp_path / "run", "round")] == [3, 2, 3]
    assert events(tmp_path / "run", "run_finished")[0]["total_tokens"] == 8 * 2 * 32


@pytest.mark.parametrize(
    ("setting", "said"),
    [("rounds.on_failure=stop", "round 2: bob did not contribute: loss nan"),
     ("rounds.min_contributors=3", "round 2: 2 of 3 contributed, rounds.min_contributors is 3")],
)  # fmt: skip
def test_a_failure_stops_the_run_where_the_recipe_says_so(
    potluck: Potluck, recipe_file: Path, tmp_path: Path, story: Story, setting: str, said: str
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = ("train", recipe_file, "--set", setting, "--set")
    ended = potluck(*words, f"records.folder={run}", code=6, before=failing("bob", 1))
    assert said in ended.err
    assert list_checkpoints(run / "checkpoints") == [0, 1]
    potluck("resume", run)
    potluck(*words, f"records.folder={other}")
    assert story(run) == story(other)


def test_training_that_diverges_says_so(potluck: Potluck, recipe_file: Path, tmp_path: Path) -> None:
    ended = potluck(
        "train", recipe_file, "--set", "local.optimizer={kind='sgd', learning_rate=1e30}", "--set",
        "local.clip_norm=0", "--set", "local.max_skipped_steps=0", "--set", "rounds.local_steps=4", code=6,
    )  # fmt: skip
    assert "0 of 3 contributed" in ended.err and "not finite" in ended.err
    assert list_checkpoints(tmp_path / "runs" / "tiny" / "checkpoints") == [0]


def test_participants_that_come_and_go(
    potluck: Potluck, tables: Tables, tmp_path: Path, story: Story, wait_for: Callable[..., None]
) -> None:
    """Simulated devices that are away now and then, a kill in between: the same run."""
    profile = {"steps_per_second": 10.0, "availability": 0.7}
    recipe = potluck.recipe(
        tables,
        participants=[{**p, "profile": profile} for p in tables["participants"]],
        rounds={"count": 6, "local_steps": 2, "min_contributors": 1, "evaluate_every": 2},
        seed=0,
    )
    potluck("train", recipe, "--set", "records.folder=whole")
    process = potluck.start("train", recipe, "--set", "records.folder=killed")
    wait_for(process, tmp_path / "killed" / "checkpoints" / "round-000003")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    potluck("resume", "killed")
    told = story(tmp_path / "whole")
    assert story(tmp_path / "killed") == told
    assert {e["status"] for e in told if e["event"] == "contribution"} == {"ok", "failed"}


# --- which checkpoints stay --------------------------------------------------------------------


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_newest_and_the_best_checkpoints_stay(
    potluck: Potluck, recipe_file: Path, tmp_path: Path, events: Callable[..., Events], keep_best: bool
) -> None:
    potluck(
        "train", recipe_file, "--set", "rounds.count=9", "--set", "records.checkpoint_every=2", "--set",
        f"records.keep_best={str(keep_best).lower()}", "--set", "records.folder=run", "--set",
        "local.optimizer={kind='adamw', learning_rate=0.02}", "--set", "local.schedule={kind='constant'}", "--set",
        "outer={kind='sgd', momentum=0.9}",
    )  # fmt: skip
    bits = {e["round"]: e["union"]["bits_per_byte"] for e in events(tmp_path / "run", "evaluation")}
    assert sorted(bits) == list(range(10))
    saved = {number: bits[number] for number in (0, 2, 4, 6, 8, 9)}
    best = min(saved, key=lambda number: saved[number])
    assert best < 8, "this momentum was to overshoot"
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [*([best] if keep_best else []), 8, 9]
    if keep_best:
        evaluated = potluck("evaluate", "run", "--best", "--json").result
        assert (evaluated["round"], evaluated["union"]["bits_per_byte"]) == (best, pytest.approx(bits[best]))


def test_a_checkpoint_holds_what_the_run_needs(done: Path) -> None:
    checkpoint = load_checkpoint(done / "checkpoints")
    assert set(checkpoint.parts) == {"shared", "outer", "participant-ada", "participant-bob", "participant-eve"}
    drawn = {name: counters["cursor"] for name, counters in checkpoint.facts["participants"].items()}
    assert sum(drawn.values()) == 8 * 2 * 2 * 2
    assert checkpoint.facts["total_tokens"] == 16 * sum(drawn.values())
