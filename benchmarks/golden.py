"""Whether two commits of potluck do the same: some fifty short runs of each, compared bit for bit.

    python -m benchmarks.golden BEFORE [AFTER]

Each commit is checked out beside the repository, runs every case by the command line only, and leaves its facts in
``runs/golden/COMMIT.json``: the hash of each case's model, all events without times and hashes of recipes, and so all
bytes, losses and norms. Facts that are there already are taken; AFTER is the working tree if it is left out, and is
always run. What differs is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks._golden_cases import CASES, TEXTS, Case

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "runs" / "golden"
LIMIT = 600  # seconds of one verb
UNTOLD = {"time", "seconds", "recipe_hash", "environment", "potluck", "schema", "path", "run"}
UNEVEN = {"run_resumed", "run_interrupted", "checkpoint", "refused"}  # where and when, not what
INTERRUPTED = 130
Facts = dict[str, Any]


def facts_of(source: Path, cases: Mapping[str, Case], processes: int) -> Facts:
    """What every case comes to with the code under `source`, by name."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes) as pool:
        root = Path(folder)
        write_texts(root / "texts")
        found = pool.map(lambda item: run_case(source, root, *item), cases.items())
        return dict(zip(cases, found, strict=True))


def write_texts(root: Path) -> None:
    """A folder of short documents for each participant, each with words of its own."""
    for name, words in TEXTS.items():
        draw = random.Random(name)
        (root / name).mkdir(parents=True)
        for number in range(40):
            (root / name / f"{number}.txt").write_text(" ".join(draw.choices(words, k=40)))


def run_case(source: Path, root: Path, name: str, case: Case) -> Facts:
    place = root / name
    place.mkdir()
    for file, content in case.files.items():
        text = content if isinstance(content, str) else tomli_w.dumps(content)
        (place / file).write_text(
            text.replace("TEXTS", str(root / "texts")).replace("RECIPES", str(source / "recipes"))
        )
    for number, words in enumerate(case.commands):
        stopped_after = case.stopped_after if number == 0 else 0
        code, said = perform(source, place, words, stopped_after)
        if code and not (stopped_after and code == INTERRUPTED):
            return {"failed": f"{' '.join(words)}: {code}", "said": said[-600:]}
    return {"models": models(place), "events": events(place)}


def perform(source: Path, place: Path, words: Sequence[str], stopped_after: int) -> tuple[int, str]:
    """Exit code and errors of one verb."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", "from potluck.cli import main; main()", *words],
            cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        end = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < end:
            if stopped_after and rounds_done(place) >= stopped_after:
                process.terminate()
                process.wait(LIMIT)
            time.sleep(0.02)
        process.kill()
        code = process.wait()
        errors.seek(0)
        return code, errors.read()


def rounds_done(place: Path) -> int:
    return sum(path.read_bytes().count(b'"event":"round"') for path in place.rglob("events.jsonl"))


def models(place: Path) -> dict[str, str]:
    """The hash of every file of weights that the case left outside of checkpoints."""
    found = (path for path in sorted(place.rglob("*.safetensors")) if "checkpoints" not in path.parts)
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if path.parent.name in ("model", "adapter", "out")
    }


def events(place: Path) -> dict[str, list[Any]]:
    return {
        str(path.parent.relative_to(place)): [
            told(event) for line in path.read_text().splitlines() if (event := json.loads(line))["event"] not in UNEVEN
        ]
        for path in sorted(place.rglob("events.jsonl"))
    }


def told(value: Any) -> Any:
    """An event without what two runs of the same bits need not share."""
    if isinstance(value, dict):
        return {key: told(inner) for key, inner in value.items() if key not in UNTOLD}
    return [told(inner) for inner in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Each place where two facts differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif before != after:
        yield f"{where}: {str(before)[:120]} -> {str(after)[:120]}"


def recorded(commit: str, cases: Mapping[str, Case], processes: int) -> Facts:
    """Facts of a commit, kept from an earlier call or made now."""
    sha = _git("rev-parse", commit)
    kept = PLACE / f"{sha}.json"
    known: Facts = json.loads(kept.read_text()) if kept.is_file() else {}
    lacking = {name: case for name, case in cases.items() if name not in known}
    if lacking:
        with tempfile.TemporaryDirectory() as folder:
            _git("worktree", "add", "--detach", f"{folder}/tree", sha)
            try:
                known |= facts_of(Path(folder) / "tree", lacking, processes)
            finally:
                _git("worktree", "remove", "--force", f"{folder}/tree")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=1))
    return {name: known[name] for name in cases}


def _git(*words: str) -> str:
    return subprocess.run(("git", *words), cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("before")
    reader.add_argument("after", nargs="?")
    reader.add_argument("--only", default="", help="cases whose name holds this")
    reader.add_argument("--processes", type=int, default=2)
    asked = reader.parse_args()
    cases = {name: case for name, case in CASES.items() if asked.only in name}
    before = recorded(asked.before, cases, asked.processes)
    after = recorded(asked.after, cases, asked.processes) if asked.after else facts_of(ROOT, cases, asked.processes)
    wrong = 0
    for name in cases:
        found = list(differences(before[name], after[name]))
        failed = "failed" in before[name] or "failed" in after[name]
        wrong += bool(found) or failed
        print(f"{'DIFFERS' if found else 'FAILED' if failed else 'same':8} {name}")
        for line in found[:5] + [str(after[name])] * failed:
            print(f"         {line}")
    print(f"{len(cases) - wrong} of {len(cases)} cases are the same")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
