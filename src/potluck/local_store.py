"""A participant's state on its own disk: what it was after each task, and what it answered.

A task counts once: one that comes again gets the answer that was kept, and one of an earlier revision (the coordinator
went back to a checkpoint) begins from the state before it. So whoever is killed, wherever it was, the same numbers
come out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from potluck.contribution import Contribution
from potluck.errors import CheckpointError
from potluck.files import storing
from potluck.local.network import Network
from potluck.local_state import LocalState, restore_state, state_facts, state_tensors
from potluck.records.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from potluck.updates.codec import payload_parts


@dataclass(frozen=True)
class Answer:
    """What was answered to a task: a contribution, or the reason why there is none."""

    contribution: Contribution | None
    reason: str


@dataclass(frozen=True)
class _Entry:
    number: int
    task: str
    revision: int
    trained: bool


class LocalStore:
    """States and answers of one participant in one run.

    Args:
        folder: The participant's folder for this run.
        identity: Of run, text and tokenizer; a folder that was begun with another is refused.
        keep: Tasks that a coordinator may go back.

    Raises:
        CheckpointError: The folder belongs to something else, or is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], keep: int) -> None:
        self._folder, self._identity, self._keep = folder / "tasks", dict(identity), keep
        self._shared = folder / "shared.safetensors"
        self._entries = [self._entry(number) for number in list_checkpoints(self._folder)]

    def answer(self, task: str) -> Answer | None:
        """The answer that was kept of a task."""
        found = next((entry for entry in reversed(self._entries) if entry.task == task), None)
        if found is None:
            return None
        checkpoint = load_checkpoint(self._folder, found.number, only="answer")
        said = checkpoint.facts["answer"]
        if said is None:
            return Answer(None, checkpoint.facts["reason"])
        tensors = checkpoint.parts.get("answer", {})
        return Answer(
            Contribution(kind=said["kind"], revision=said["revision"], header=said["header"], tensors=tensors), ""
        )

    def go_back(self, state: LocalState, fresh: Callable[[], LocalState], revision: int) -> None:
        """Put the state that training from ``revision`` begins with into ``state``; ``fresh`` makes the first one."""
        before = [entry for entry in self._entries if entry.trained and entry.revision < revision]
        if not before:
            first = fresh()
            restore_state(state, state_tensors(first), state_facts(first))
            return
        checkpoint = load_checkpoint(self._folder, before[-1].number, only="local")
        restore_state(state, checkpoint.parts["local"], checkpoint.facts["state"])

    def last_before(self, revision: int) -> int:
        """Revision from which the newest state before that of ``revision`` was trained; -1 if there is none."""
        return max(
            (entry.revision for entry in self._entries if entry.trained and entry.revision < revision), default=-1
        )

    def keep(self, task: str, revision: int, trained: bool, state: LocalState, answer: Answer) -> None:
        """Save what a task came to, before its answer is sent.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        number = self._entries[-1].number + 1 if self._entries else 1
        said = answer.contribution
        facts = {
            **self._identity,
            "task": task,
            "revision": revision,
            "trained": trained,
            "state": state_facts(state) if trained else None,
            "answer": said and {"kind": said.kind, "revision": said.revision, "header": dict(said.header)},
            "reason": answer.reason,
        }
        parts: dict[str, Mapping[str, Tensor]] = {"answer": said.tensors} if said is not None and said.tensors else {}
        parts |= {"local": state_tensors(state)} if trained else {}
        save_checkpoint(self._folder, number, facts, {name: payload_parts(part) for name, part in parts.items()})
        if trained:  # what was done after this revision, before the coordinator went back, is void
            self._entries = [e for e in self._entries if not (e.trained and e.revision >= revision)]
        self._entries.append(_Entry(number, task, revision, trained))
        prune_checkpoints(self._folder, self._keep, None)
        self._entries = [e for e in self._entries if e.number > number - self._keep]

    def keep_shared(self, theta: Tensor, digest: str) -> None:
        """Save the shared state, so that the next task need not bring it again."""
        partial = self._shared.with_name(".shared.partial")
        with storing(self._shared):
            self._shared.parent.mkdir(parents=True, exist_ok=True)
            save_file({"theta": theta}, partial, {"sha256": digest})
            partial.replace(self._shared)

    def shared(self) -> Tensor | None:
        """The shared state that was saved last, if it is whole; whoever uses it checks which one it is."""
        try:
            return load_file(self._shared)["theta"]
        except (OSError, SafetensorError, KeyError):
            return None

    def _entry(self, number: int) -> _Entry:
        facts = self._read(number).facts
        for what, mine in self._identity.items():
            if facts.get(what) != mine:
                raise CheckpointError(
                    f"{self._folder.parent}: was begun with another {what}",
                    "restore what has changed, or join with another --folder: then the optimizer starts anew",
                )
        task, revision, trained = (facts.get(key) for key in ("task", "revision", "trained"))
        if not isinstance(task, str) or type(revision) is not int or type(trained) is not bool:
            hint = "join with another --folder: then the optimizer starts anew"
            raise CheckpointError(f"{self._folder}: what was kept of task {number} is damaged", hint)
        return _Entry(number, task, revision, trained)

    def _read(self, number: int) -> Checkpoint:
        return load_checkpoint(self._folder, number, only="")


def layout_hash(network: Network) -> str:
    """SHA-256 of the layout of a network's parameters: both sides must have the same."""
    return hashlib.sha256(json.dumps(network.layout).encode()).hexdigest()
