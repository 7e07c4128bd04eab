"""What is said between coordinator and participant: signed JSON, and behind it a payload if that is small.

::

    64 bytes   Ed25519 signature of what follows up to the payload
    8 bytes    length of the JSON, little-endian
    JSON       the frame's facts; of a message with tensors they name the payload's size and SHA-256
    payload    if it is not a blob
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field

from potluck.contribution import Contribution, Packed, Task
from potluck.engine.nats.identity import SIGNATURE_BYTES, sign, signed_by
from potluck.errors import EngineError
from potluck.untrusted import Count, Digest, Line, ShortText, checked, loads

MAX_FACTS_BYTES = 1 << 20
END = "end"  # the name of the task that says that the run is over
Facts = TypeVar("Facts", bound=BaseModel)


class Codec(Protocol):
    """Between messages and bytes; the engine itself knows nothing of tensors."""

    def pack(self, message: Task | Contribution, like: Packed | None = None) -> Packed:
        """A message as fields and a payload: that of ``like``, if the tensors are the same."""

    def unpack(self, fields: Any, payload: bytes | Path | None) -> Task | Contribution:
        """A message from these, whose hash has been checked.

        Raises:
            TrainingError: It is not a message.
        """


@dataclass(frozen=True)
class Frame:
    """A frame whose signature holds.

    Attributes:
        facts: The JSON.
        payload: What came behind it, held to the hash in the facts.
        size: Bytes of the whole frame.
    """

    facts: Mapping[str, Any]
    payload: bytes | None
    size: int

    @property
    def blob(self) -> tuple[str, int] | None:
        """Hash and size of the payload that must be fetched."""
        named = payload_of(self.facts)
        return None if named is None or self.payload is not None else named


class TaskFacts(BaseModel):
    """What a frame with a task says: whose it is, and by when; its message has kind, revision, arguments."""

    run: str
    to: str
    task: ShortText
    state: ShortText = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    reason: Line = ""
    message: dict[str, Any] = {}


class ReplyFacts(BaseModel):
    """What a frame with a reply says; ``defect`` is a failure that is potluck's own."""

    run: str
    sender: Annotated[str, Field(alias="from")]
    task: ShortText
    status: Literal["ok", "failed", "defect"]
    reason: Line = ""
    message: dict[str, Any] = {}


class _Payload(BaseModel):
    bytes: Count
    sha256: Digest


def facts_of(kind: type[Facts], frame: Frame) -> Facts:
    """A frame's facts, typed.

    Raises:
        EngineError: They are others.
    """
    try:
        return checked(kind, frame.facts)
    except ValueError as error:
        raise EngineError(f"garbage: {error}") from None


def signed(seed: str, facts: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """A frame as bytes."""
    text = json.dumps(facts, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    body = len(text).to_bytes(8, "little") + text
    return sign(seed, body) + body + payload


def read_frame(data: bytes, public: str) -> Frame:
    """A frame from bytes of unknown origin.

    Raises:
        EngineError: It is damaged, not signed by the holder of ``public``, or its payload is not the one it names.
    """
    start = SIGNATURE_BYTES + 8
    end = start + int.from_bytes(data[SIGNATURE_BYTES:start], "little")
    if len(data) < start or not start <= end <= min(start + MAX_FACTS_BYTES, len(data)):
        raise EngineError("garbage: not a frame")
    if not signed_by(public, data[SIGNATURE_BYTES:end], data[:SIGNATURE_BYTES]):
        raise EngineError("a signature that is not its sender's")
    try:
        facts = checked(dict[str, Any], loads(data[start:end], most_bytes=MAX_FACTS_BYTES))
        named = payload_of(facts)
    except ValueError as error:
        raise EngineError(f"garbage: a frame that is not as it should be: {error}") from None
    payload = data[end:]
    if not payload:
        return Frame(facts, None, len(data))
    if named is None or len(payload) != named[1]:
        raise EngineError("truncated: a payload that is not as long as the frame says")
    if hashlib.sha256(payload).hexdigest() != named[0]:
        raise EngineError("damaged: a payload that does not match its hash")
    return Frame(facts, payload, len(data))


def payload_of(facts: Mapping[str, Any]) -> tuple[str, int] | None:
    """Hash and size of the payload of a frame's message, if it has one.

    Raises:
        ValueError: They are not a hash and a size.
    """
    message = checked(dict[str, Any], facts.get("message", {}))
    if "payload" not in message:
        return None
    named = checked(_Payload, message["payload"])
    return named.sha256, named.bytes


def task_name(task: Task) -> str:
    """The name under which a task counts once: whoever asks the same of the same state asks for the same answer."""
    content = json.dumps([task.kind, task.revision, task.state, dict(task.parameters)], sort_keys=True)
    return f"{task.kind}-{task.revision}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
