"""Signs of life as they come from outside: each fact of its type and within bounds, or no sign of life at all."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from potluck.untrusted import Count, Line, checked, loads

MAX_BYTES = 1 << 14
_Name = Annotated[Line, Field(max_length=100)]
_Figure = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class _Holding(BaseModel):
    """How much text a participant says it holds."""

    name: _Name = ""
    content_hash: _Name
    train_tokens: Count
    train_bytes: Count
    train_documents: Count
    validation_tokens: Count
    validation_bytes: Count
    validation_documents: Count


class _Sign(BaseModel):
    status: Literal["reading", "ready", "working", "left", "refused"]
    session: _Name = ""
    process: _Name = ""
    refused: Count = 0
    task: _Name = ""
    lacks: _Name = ""
    reason: Line = ""
    words: bool = False
    evaluates: bool = True
    vocabulary: _Name = ""
    model: _Name = ""
    potluck: _Name = ""
    worked_seconds: _Figure = 0.0
    holding: _Holding | None = None
    environment: Annotated[dict[_Name, _Name | Count], Field(max_length=20)] = {}


class _Progress(BaseModel):
    status: Literal["reading", "working", "left", "refused"]
    session: _Name = ""
    process: _Name = ""
    refused: Count = 0
    event: _Name = ""
    time: _Name = ""
    round: Count | None = None
    rounds: Count | None = None
    bits_per_byte: _Figure | None = None


def read_sign(data: bytes) -> dict[str, Any]:
    """A participant's sign of life; what is not known here is left out.

    Raises:
        ValueError: It is none.
    """
    return checked(_Sign, loads(data, most_bytes=MAX_BYTES)).model_dump(exclude_unset=True)


def read_progress(data: bytes) -> dict[str, Any]:
    """How far the coordinator says that the run is.

    Raises:
        ValueError: It does not say so.
    """
    found = checked(_Progress, loads(data, most_bytes=MAX_BYTES))
    return found.model_dump(exclude_unset=True, exclude={"session", "process", "refused"})
