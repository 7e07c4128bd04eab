"""Checkpoints: everything a run needs to go on, written so that the last good one is never lost.

A checkpoint is a folder ``round-000012`` with one safetensors file per part and ``state.json``: the run's facts, the
SHA-256 of each part and its own. It is written under another name, forced to disk, and renamed when it is whole. A part
that is what it was in the newest checkpoint is a hard link to it. Of the best one, when it is no longer among the
newest, the weights alone are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from potluck.errors import CheckpointError, StorageError
from potluck.files import storing, write_text
from potluck.untrusted import load_json

FORMAT = 1
WEIGHTS = "shared"  # the part that holds them
Parts = Mapping[str, Sequence[memoryview]]  # each a safetensors file in pieces


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        facts: What was saved beside the tensors; JSON.
        parts: Tensors by part and name.
    """

    round: int
    facts: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, number: int, facts: Mapping[str, Any], parts: Parts) -> None:
    """Write the checkpoint of round ``number`` below ``folder``, all or nothing.

    Args:
        folder: Of all checkpoints.
        number: Of the round.
        facts: JSON.
        parts: By name; `potluck.updates.codec.payload_parts` makes one of tensors, without a copy.

    Raises:
        StorageError: The disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final, partial = folder / f"round-{number:06d}", folder / f".partial-{number:06d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        before, hashes = _newest(folder), {}
        for part, pieces in parts.items():
            path = partial / f"{part}.safetensors"
            hashes[part] = _hash_of(pieces)
            if not _linked(before.get((part, hashes[part])), path, sum(piece.nbytes for piece in pieces)):
                _write(path, pieces)
        _write_state(partial, {"format": FORMAT, "round": number, "facts": facts, "sha256": hashes})
        _sync_folder(partial)
        if final.exists():  # the state of this round was changed without a round
            older = folder / f".older-{number:06d}"
            shutil.rmtree(older, ignore_errors=True)
            final.rename(older)
            partial.rename(final)
            shutil.rmtree(older, ignore_errors=True)
        else:
            partial.rename(final)
        _sync_folder(folder)
    except (OSError, StorageError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"{final}: the checkpoint cannot be written ({error})", "free some space and resume from the last one"
        ) from None


def note_attempt(folder: Path, revision: int) -> None:
    """Note beside the checkpoints that the round from a revision has failed once more.

    Raises:
        StorageError: It cannot be written.
    """
    found = attempts(folder)
    found[revision] = found.get(revision, 0) + 1
    write_text(folder / "attempts.json", json.dumps({str(number): count for number, count in found.items()}))


def attempts(folder: Path) -> dict[int, int]:
    """How often the rounds from each revision have failed."""
    try:
        return {int(number): int(count) for number, count in load_json(folder / "attempts.json").items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def load_checkpoint(folder: Path, number: int | None = None, only: str | None = None) -> Checkpoint:
    """Read the newest checkpoint below ``folder``, or that of round ``number``; all parts, or ``only`` one.

    Raises:
        CheckpointError: There is none, or it is damaged; the message names the file and the others there are.
    """
    found = list_checkpoints(folder)
    if number is None and found:
        number = found[-1]
    if number is None or number not in found:
        have = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{folder}: no checkpoint of round {number}", f"checkpoints of rounds: {have}")
    path = folder / f"round-{number:06d}"
    others = ", ".join(str(n) for n in found if n != number) or "none"
    hint = f"resume from an earlier one with --round; other checkpoints of rounds: {others}"
    try:
        state = load_json(path / "state.json")
        if state.pop("own_sha256") != _content_hash(state):
            raise CheckpointError(f"{path}/state.json: damaged: its content does not match its hash", hint)
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {state['format']}, this potluck reads {FORMAT}")
        if only is None and state.get("weights_alone"):
            raise CheckpointError(
                f"{path}: of the best checkpoint only the weights were kept: nothing goes on from it", hint
            )
        parts = {}
        for part, digest in state["sha256"].items():
            if only not in (None, part):
                continue
            file = path / f"{part}.safetensors"
            if _hash(file) != digest:
                raise CheckpointError(f"{file}: damaged: its content does not match its hash", hint)
            parts[part] = load_file(file)
        return Checkpoint(number, dict(state["facts"]), parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error})", hint) from None


def list_checkpoints(folder: Path) -> list[int]:
    """Rounds of the whole checkpoints below ``folder``, ascending."""
    names = (re.fullmatch(r"round-(\d+)", path.name) for path in folder.glob("round-*"))
    return sorted(int(name[1]) for name in names if name)


def prune_checkpoints(folder: Path, keep_last: int, best: int | None) -> None:
    """Remove all checkpoints but the newest ``keep_last``, and of round ``best`` all but the weights."""
    for number in list_checkpoints(folder)[:-keep_last]:
        if number == best:
            _keep_weights(folder / f"round-{number:06d}")
        else:
            _remove(folder, number)
    for leftover in folder.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def step_back(folder: Path, number: int) -> None:
    """Remove the checkpoints after round ``number``, from which a run goes on."""
    for later in reversed(list_checkpoints(folder)):
        if later > number:
            _remove(folder, later)


def _remove(folder: Path, number: int) -> None:
    """Remove a checkpoint; it loses its name first, so that half of one is never taken for a whole."""
    nameless = folder / f".partial-{number:06d}"
    with storing(folder):
        shutil.rmtree(nameless, ignore_errors=True)
        (folder / f"round-{number:06d}").rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _keep_weights(path: Path) -> None:
    """Let go of all but the weights; the facts say so first."""
    try:
        state = load_json(path / "state.json")
        if not state.get("weights_alone"):
            del state["own_sha256"]
            _write_state(path, {**state, "sha256": {WEIGHTS: state["sha256"][WEIGHTS]}, "weights_alone": True})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # damaged: whoever reads it is told
    for file in path.glob("*.safetensors"):
        if file.stem != WEIGHTS:
            file.unlink()


def _newest(folder: Path) -> dict[tuple[str, str], Path]:
    """The files of the newest checkpoint by part and hash, as far as it says."""
    found = list_checkpoints(folder)
    if not found:
        return {}
    path = folder / f"round-{found[-1]:06d}"
    try:
        hashes = load_json(path / "state.json")["sha256"]
        return {(part, str(digest)): path / f"{part}.safetensors" for part, digest in hashes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _linked(file: Path | None, path: Path, size: int) -> bool:
    """Make ``path`` another name of a file of that size, where there is one and the disk can."""
    try:
        if file is None or file.stat().st_size != size:
            return False
        os.link(file, path)
    except OSError:
        return False
    return True


def _write(path: Path, pieces: Sequence[memoryview]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _write_state(folder: Path, content: Mapping[str, Any]) -> None:
    write_text(folder / "state.json", json.dumps({**content, "own_sha256": _content_hash(content)}, indent=1))


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_of(pieces: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
