"""What travels between the coordinator and a participant.

A task goes out, a reply comes back. Training, evaluation and every later capability use these
same types: a new capability is a new ``kind`` of task with one function on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the control plane runs without torch
    from torch import Tensor

ParticipantId = str
TaskId = int
Scalar = str | int | float | bool
Header = Mapping[str, Scalar]
Fields = dict[str, Any]
ReplyStatus = Literal["ok", "late", "failed", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the coordinator asks of one participant.

    Attributes:
        kind: Which function of the participant answers, e.g. ``train`` or ``evaluate``.
        revision: Outer steps behind the shared state in ``tensors``.
        parameters: The function's arguments: JSON scalars only.
        tensors: The shared state the participant starts from.
        state: SHA-256 of that state, where participants are elsewhere; it names the task together with the above.
        seconds: How long an answer is waited for; ``None`` is for ever.
    """

    kind: str
    revision: int
    parameters: Header = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    state: str = ""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a participant sends back.

    Attributes:
        kind: The kind of the task it answers.
        revision: The revision of the shared state it started from.
        header: Figures about it: JSON scalars only.
        tensors: Its content. With the in-process engine these may be views of the
            participant's working memory: they hold until the next task is performed.
    """

    kind: str
    revision: int
    header: Header = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """How a task ended.

    Attributes:
        status: ``ok`` with a contribution; ``failed`` with the participant's reason; ``rejected`` with the engine's,
            if what came is not what was signed or announced; ``late`` if nothing came in time.
        down_bytes: Bytes of the task as serialised, sent to the participant.
        up_bytes: Bytes of the contribution as serialised, sent to the coordinator.
        seconds: Engine time from sending the task to receiving the reply.
        lasting: The contribution's tensors are nobody's working memory.
    """

    task: TaskId
    participant: ParticipantId
    status: ReplyStatus
    contribution: Contribution | None = None
    reason: str = ""
    down_bytes: int = 0
    up_bytes: int = 0
    seconds: float = 0.0
    lasting: bool = False


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A message as bytes: what it says beside its tensors, and these as the payload.

    Attributes:
        fields: JSON; with a payload they name its size and SHA-256.
        parts: The payload, one buffer after the other: views of the tensors, not copies.
    """

    fields: Fields
    parts: Sequence[memoryview] = ()

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class HeldOutText:
    """How much text a participant holds out: tokens that are predicted in it, and its UTF-8 bytes."""

    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ParticipantInfo:
    """What the roster says of one participant.

    Attributes:
        evaluates: It has held-out text to evaluate on.
        holds: Tokens of training text that it said it holds when it first joined; they weigh its contributions where
            ``rounds.weights`` is ``data``.
        held_out: How much held-out text it said it has.
    """

    name: ParticipantId
    evaluates: bool = True
    holds: int = 0
    held_out: HeldOutText | None = None


class Shelf:
    """Tensors for a checkpoint, each under a name of its own, and once however often it is put there."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def put(self, tensor: Tensor) -> str:
        """The name under which a tensor lies."""
        name = self._names.setdefault(id(tensor), f"{len(self.tensors):06d}")
        self.tensors.setdefault(name, tensor)
        return name


def reply_facts(reply: Reply, shelf: Shelf) -> Fields:
    """A reply as JSON, its tensors on the shelf: what ``reply_of`` reads."""
    said = reply.contribution
    facts = {key: value for key, value in vars(reply).items() if key not in ("contribution", "lasting")}
    if said is None:
        return {**facts, "contribution": None}
    tensors = {name: shelf.put(tensor) for name, tensor in said.tensors.items()}
    about = {"kind": said.kind, "revision": said.revision, "header": dict(said.header), "tensors": tensors}
    return {**facts, "contribution": about}


def reply_of(facts: Fields, shelf: Mapping[str, Tensor]) -> Reply:
    """The reply that ``reply_facts`` told of."""
    said = facts["contribution"]
    if said is not None:
        tensors = {name: shelf[place] for name, place in said["tensors"].items()}
        said = Contribution(kind=said["kind"], revision=said["revision"], header=said["header"], tensors=tensors)
    return Reply(**{**facts, "contribution": said, "lasting": True})


def kept(reply: Reply) -> Reply:
    """A reply that outlives its participant's next task: its tensors are copied out of working memory."""
    if reply.contribution is None or reply.lasting:
        return reply
    tensors = {name: tensor.clone() for name, tensor in reply.contribution.tensors.items()}
    return replace(reply, contribution=replace(reply.contribution, tensors=tensors))
