"""A participant at work in a run: what it has, what it has done, and when it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potluck.engine.nats.site import Received, Site
from potluck.recipe import Recipe
from potluck.recipe.part import Policy
from potluck.records.journal import Journal
from potluck.sent import Sent

HURRY_SECONDS = 3.0


@dataclass
class Joined:
    """A participant at work in a run.

    Attributes:
        site: Its end of the engine.
        recipe: The run's, with this participant's own text and machine in it.
        folder: Where its state is kept.
        sent: What has left, and its owner's limits.
        stop: Whether it was asked to leave.
        predicts_with: Its own model, if others may ask it.
        edits: Its own edits.
        edit_secret: File with the secret that the participants share.
    """

    site: Site
    name: str
    recipe: Recipe
    policy: Policy
    folder: Path
    journal: Journal
    sent: Sent
    stop: Callable[[], bool]
    predicts_with: Path | None = None
    edits: str | None = None
    edit_secret: Path | None = None
    done: int = -1  # revision from which the state in memory was trained
    tasks: int = 0
    worked_seconds: float = 0.0  # at tasks of all kinds ...
    trained_seconds: float = 0.0  # ... and at local steps
    ended: bool = False
    asked: float = 0.0  # to leave, as far as was noticed
    began: float = field(default_factory=time.monotonic)
    upcoming: Future[Received | None] | None = None  # the next task, if it is fetched while local steps go on
    behind: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "potluck-behind"))

    def hurries(self) -> bool:
        """Whether it was asked to leave so long ago that no transfer may hold it up."""
        if not self.stop():
            return False
        self.asked = self.asked or time.monotonic()
        return time.monotonic() - self.asked > HURRY_SECONDS

    def work(self, seconds: float, trains: bool) -> None:
        """Count what was worked."""
        self.worked_seconds += seconds
        self.trained_seconds += seconds if trains else 0.0

    def result(self, ended: str) -> dict[str, Any]:
        """What ``potluck join`` prints in the end."""
        return {
            "participant": self.name,
            "ended": ended,
            "tasks": self.tasks,
            "rounds": self.sent.rounds,
            "sent_bytes": self.sent.bytes,
            "sent": str(self.sent.path),
            "worked_seconds": round(self.worked_seconds, 3),
            "trained_seconds": round(self.trained_seconds, 3),
            "seconds": round(time.monotonic() - self.began, 3),
            "folder": str(self.folder),
        }
