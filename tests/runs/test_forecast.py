"""What `check` says beforehand is what the run then does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from potluck.records.curves import RunRecord
    from tests.conftest import Potluck, Tables

INT8 = {"links": [{"kind": "quantize"}]}
SPARSE = [
    {"kind": "error-feedback", "decay": 0.95},
    {"kind": "block-top-k", "k": 64, "block": 4096},
    {"kind": "quantize", "bits": 2, "block": 64},
]
SMALL_DOWN = {"kind": "quantized", "history": 2}
MODEL = {"layers": 4, "width": 32, "heads": 2, "feedforward": 64, "context": 64}


def run_of(potluck: Potluck, tables: Tables, folder: Path, **changes: Any) -> tuple[Any, RunRecord]:
    """What `check` says of a recipe, and the run."""
    from potluck.records.curves import read_run

    recipe = potluck.recipe(tables, model=MODEL, **changes)
    expected = potluck("check", recipe, "--json").result
    potluck("train", recipe, "--set", f"records.folder={folder}")
    return expected, read_run(folder)


def streaming(fragments: int, overlap: int) -> dict[str, Any]:
    return {"streaming": {"kind": "streaming", "fragments": fragments, "overlap": overlap}}


@pytest.mark.parametrize(
    ("rounds", "updates"),
    [
        ({"evaluate_every": 1}, {}),
        ({"evaluate_every": 3, "participants_per_round": 2}, {}),
        ({"evaluate_every": 2}, INT8),
        ({}, {"links": [{"kind": "quantize", "bits": 4, "block": 64}]}),
        ({}, {"links": [{"kind": "error-feedback"}, {"kind": "dct-top-k", "chunk": 16}]}),
        ({"count": 6, "evaluate_every": 2}, {"links": SPARSE, "download": SMALL_DOWN}),
        ({"count": 9, "evaluate_every": 9, "participants_per_round": 1}, {"download": SMALL_DOWN}),
        ({"count": 5, "evaluate_every": 5, **streaming(2, 1)}, {}),
        ({"count": 7, "evaluate_every": 3, **streaming(3, 0)}, INT8),
        ({"count": 6, "evaluate_every": 6, **streaming(5, 1)}, {"download": SMALL_DOWN}),
        ({"streaming": {"kind": "eager"}}, INT8),
    ],
)
def test_parameters_tokens_and_bytes(
    potluck: Potluck, tables: Tables, tmp_path: Path, rounds: dict[str, Any], updates: dict[str, Any]
) -> None:
    changes = {"rounds": {"count": 4, "local_steps": 2, **rounds}, "updates": updates}
    expected, run = run_of(potluck, tables, tmp_path / "run", **changes)
    assert (run.parameters, run.total_tokens) == (expected["parameters"], expected["total_tokens"])
    for direction in ("up_bytes", "down_bytes"):
        assert run.transferred(direction) == pytest.approx(expected[direction], rel=0.01)
    assert max(c.up_bytes for c in run.contributions) == pytest.approx(expected["peak_update_bytes"], rel=0.01)
    assert not expected["download_is_bound"]
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*04/*.safetensors"))
    if rounds.get("count", 4) == 4:
        assert written == pytest.approx(expected["checkpoint_bytes"], rel=0.02)


def test_a_download_of_differences_is_at_most_what_was_said(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    updates = {"links": [{"kind": "error-feedback"}, {"kind": "top-k", "density": 0.01}], "download": {"kind": "delta"}}
    rounds = {"count": 6, "local_steps": 2, "evaluate_every": 6}
    expected, run = run_of(potluck, tables, tmp_path / "run", rounds=rounds, updates=updates)
    assert expected["download_is_bound"]
    assert run.transferred("up_bytes") == pytest.approx(expected["up_bytes"], rel=0.01)
    assert 0.8 * expected["down_bytes"] < run.transferred("down_bytes") <= 1.01 * expected["down_bytes"]


def test_a_bpe_that_little_text_does_not_fill(potluck: Potluck, tables: Tables, tmp_path: Path) -> None:
    expected, run = run_of(potluck, tables, tmp_path / "run", tokenizer={"kind": "bpe", "vocab_size": 32_000})
    assert expected["vocabulary_size"] < 1_000 and not expected["vocabulary_is_bound"]
    assert run.parameters == expected["parameters"]
    assert any("no more than" in warning for warning in expected["warnings"])


# --- memory --------------------------------------------------------------------------------------

VOCABULARY = 40_000
PEAK = """
import sys
from pathlib import Path
from potluck.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
status = Path("/proc/self/status").read_text()
print("peak", next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")))
"""


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """A tokenizer of bytes with many words that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word {n}" for n in range(VOCABULARY - 257))]
    tokenizer = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return {"kind": "folder", "path": str(folder)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux")
@pytest.mark.parametrize(
    "local",
    [{"batch_size": 12, "sequence_length": 64}, {"batch_size": 1, "sequence_length": 16}],
    ids=["a step needs most", "an evaluation needs most"],
)
def test_the_peak_of_memory_with_a_large_vocabulary(
    potluck: Potluck, tables: Tables, tmp_path: Path, local: dict[str, int]
) -> None:
    data = {**tables["data"], "validation_bytes": 4_000, "validation_fraction": 0.5}
    tables = {**tables, "tokenizer": tokenizer_of(tmp_path / "words"), "local": local, "data": data}
    recipe = potluck.recipe(tables, rounds={"count": 1, "local_steps": 1})
    expected = potluck("check", recipe, "--json").result
    words = ["train", str(recipe), "--set", f"records.folder={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.rpartition("peak ")[2])
    assert 0.85 * peak < expected["process_bytes"] < 1.15 * peak
    assert expected["process_bytes"] > expected["device_bytes"] + expected["coordinator_bytes"]


SLOW = {"steps_per_second": 2.0, "uplink": 1.0, "downlink": 2.0, "latency": 50.0}
FAST = {"steps_per_second": 7.0, "uplink": 20.0, "downlink": 100.0, "latency": 10.0}


@pytest.mark.parametrize(
    ("profiles", "rounds", "updates"),
    [
        ((SLOW, SLOW, SLOW), {"evaluate_every": 2}, {}),
        ((SLOW, FAST, {**FAST, "uplink": 0.1}), {"evaluate_every": 2, "participants_per_round": 2}, INT8),
        ((SLOW, FAST, SLOW), {"evaluate_every": 3, **streaming(4, 2)}, {}),
        ((SLOW, FAST, FAST), {"evaluate_every": 6, "streaming": {"kind": "eager"}}, INT8),
    ],
)
def test_the_virtual_clock_is_foretold(
    potluck: Potluck, tables: Tables, tmp_path: Path, profiles: Any, rounds: dict[str, Any], updates: dict[str, Any]
) -> None:
    from potluck.planning import predicted_seconds
    from potluck.recipe import load_recipe
    from potluck.records.events import read_events

    people = [{**person, "profile": profile} for person, profile in zip(tables["participants"], profiles, strict=True)]
    changes = {"rounds": {"count": 6, "local_steps": 4, **rounds}, "updates": updates, "participants": people}
    run_of(potluck, tables, tmp_path / "run", **changes)
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    seconds = [e["seconds"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] in CLOCKED]
    said = predicted_seconds(recipe, {p.name: p.profile for p in recipe.participants if p.profile})
    assert sum(seconds) == pytest.approx(said, rel=0.01)


CLOCKED = ("round", "evaluation")
