"""What JetStream answers: read like everything from outside, and its errors as ours."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from potluck.errors import EngineError, Outrun, StorageError
from potluck.untrusted import Line, checked, loads

_STORE_IS_FULL = (10023, 10047, 10077)  # JetStream's codes for no room in account, server or stream
_WRONG_LAST_SEQUENCE = (10071, 10164)


def sequence_in(data: bytes | bytearray | memoryview, what: str) -> int:
    """Where a message was stored, by JetStream's answer; raises as `answer_in` does."""
    answer = answer_in(data, what)
    if type(answer.get("seq")) is not int:
        raise EngineError(f"{what}: an answer without a place")
    return int(answer["seq"])


def answer_in(data: bytes | bytearray | memoryview, what: str) -> dict[str, Any]:
    """An answer of JetStream.

    Raises:
        StorageError, Outrun, EngineError: What it says went wrong, or it is none.
    """
    try:
        answer = checked(_Answer, loads(data))
    except ValueError as wrong:
        raise EngineError(f"{what}: not an answer of JetStream: {wrong}") from None
    error = answer.error
    if error is None:
        return answer.model_extra or {}
    text = f"{what}: {error.description}"
    if error.err_code in _STORE_IS_FULL:
        raise StorageError(f"the message server's store is full ({text})", "give it more disk, or raise engine.storage")
    raise Outrun(text) if error.err_code in _WRONG_LAST_SEQUENCE else EngineError(text)


class _Error(BaseModel):
    err_code: int = 0
    description: Line = "an error"


class _Answer(BaseModel, extra="allow"):
    error: _Error | None = None
