"""What a run is about, as the coordinator signs it for everybody, and as it is read: typed and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from potluck.engine.nats.frames import facts_of, read_frame
from potluck.engine.nats.post import Post
from potluck.engine.nats.subjects import COORDINATOR
from potluck.errors import EngineError
from potluck.untrusted import Count, ShortText

MAX_VOCABULARY_BYTES = 1 << 27
_Tokens = Annotated[list[Count], Field(max_length=1000)]


class _Named(BaseModel):
    name: ShortText


class _Recipe(BaseModel, extra="allow"):
    participants: list[_Named]


class About(BaseModel):
    """The facts of the about frame.

    Attributes:
        recipe: As TOML tables; it is parsed like any recipe from outside.
        end_of_text, stops, beginning: Of the vocabulary that is the frame's payload, once it is known.
        model: SHA-256 of the layout of the model's parameters.
        parameters: How many those are.
    """

    run: str
    recipe: dict[str, Any]
    end_of_text: Count | None = None
    stops: _Tokens = []
    beginning: _Tokens | None = None
    model: ShortText = ""
    parameters: Count | None = None


class _Names(BaseModel):
    recipe: _Recipe


def participants_of(data: bytes, coordinator: str) -> list[str]:
    """Who takes part, from an about frame as it lies at the server.

    Raises:
        EngineError: It is not what the coordinator signed.
    """
    return [table.name for table in facts_of(_Names, read_frame(data, coordinator)).recipe.participants]


def read_about(post: Post, give_up: Callable[[], bool]) -> tuple[About, bytes | None] | None:
    """What the run is about, signed by the coordinator, and the vocabulary; ``None`` if that is not there yet.

    Raises:
        EngineError: The server is away, or it is not what the coordinator signed.
    """
    found = post.connection.last(post.names.direct(post.names.states, post.names.about), give_up=give_up)
    if found is None:
        return None
    frame = read_frame(found[0], post.keys[COORDINATOR])
    about = facts_of(About, frame)
    if about.run != post.names.run:
        raise EngineError("the server tells of another run")
    if (frame.payload or frame.blob) and about.end_of_text is None:
        raise EngineError("the coordinator says of its vocabulary not which token ends a text")
    if frame.blob is None:
        return about, frame.payload
    digest, size = frame.blob
    if size > MAX_VOCABULARY_BYTES:
        raise EngineError(f"a vocabulary of {size} bytes")
    path = post.folder / f"about-{digest}"
    post.blobs.get(None, digest, size, path, give_up)
    return about, path.read_bytes()
