"""What both ends of the engine need to write and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from potluck.engine.nats.blobs import Blobs
from potluck.engine.nats.connection import Connection
from potluck.engine.nats.frames import Codec
from potluck.engine.nats.subjects import Names


@dataclass(frozen=True)
class Post:
    """Everything that both ends of the engine need to write and read.

    Attributes:
        seed: One's own key.
        keys: Public keys of those one listens to, by name.
        folder: Where blobs are put.
    """

    connection: Connection
    names: Names
    seed: str
    keys: Mapping[str, str]
    blobs: Blobs
    codec: Codec
    folder: Path
