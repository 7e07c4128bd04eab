"""What things are called on the server, and who may touch them: the least permissions of each role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from potluck.contribution import ParticipantId

CHUNK_BYTES = 1 << 20
COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Permissions:
    """Subjects that a user may publish to and subscribe to; all others are refused by the server.

    Attributes:
        owner: The run's streams are this user's; all others reach them only through these subjects.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    owner: bool = False


@dataclass(frozen=True)
class Names:
    """Subjects, streams and consumers of one run.

    Attributes:
        run: Its identity on the server: hexadecimal digits.
    """

    run: str

    @property
    def tasks(self) -> str:
        """Stream of tasks, a work queue with a consumer for each participant."""
        return f"potluck-{self.run}-tasks"

    @property
    def replies(self) -> str:
        """Stream of replies, a work queue."""
        return f"potluck-{self.run}-replies"

    @property
    def states(self) -> str:
        """Stream of what all participants may read: chunks of the shared state, and what the run is about."""
        return f"potluck-{self.run}-states"

    def uploads(self, name: ParticipantId) -> str:
        """Stream of chunks that a participant sends: nobody can fill another's."""
        return f"potluck-{self.run}-uploads-{token(name)}"

    @property
    def members(self) -> str:
        """The key-value bucket in which every participant has one value."""
        return f"potluck-{self.run}-members"

    @property
    def about(self) -> str:
        """Subject of what the run is about."""
        return f"potluck.{self.run}.about"

    def task(self, name: ParticipantId) -> str:
        """Subject of a participant's tasks."""
        return f"potluck.{self.run}.task.{token(name)}"

    def reply(self, name: ParticipantId) -> str:
        """Subject of a participant's replies."""
        return f"potluck.{self.run}.reply.{token(name)}"

    def member(self, name: ParticipantId) -> str:
        """Subject of a participant's value in the bucket."""
        return f"$KV.{self.members}.{token(name)}"

    def state(self, rest: str) -> str:
        """Subject below the chunks of shared states, ``HASH.INDEX``."""
        return f"potluck.{self.run}.state.{rest}"

    def upload(self, name: ParticipantId, rest: str) -> str:
        """Subject below a participant's chunks, ``HASH.INDEX``."""
        return f"potluck.{self.run}.upload.{token(name)}.{rest}"

    def inbox(self, name: str) -> str:
        """Prefix of the subjects on which one user gets answers; nobody else may listen there."""
        return f"_potluck.{self.run}.{token(name)}"

    def direct(self, stream: str, subject: str) -> str:
        """Where to ask for the last message of a subject."""
        return f"$JS.API.DIRECT.GET.{stream}.{subject}"

    def next(self, stream: str, consumer: str) -> str:
        """Where to ask for a consumer's next message."""
        return f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"


def token(name: str) -> str:
    """A participant's name as one token of a subject, which may not hold a dot."""
    return name.replace(".", "~")


def participant_of(subject: str) -> ParticipantId:
    """Whose reply a subject is."""
    return subject.rpartition(".")[2].replace("~", ".")


def participant_permissions(names: Names, name: ParticipantId) -> Permissions:
    """A participant: its own queue, replies, uploads and value, which it may read; and to read what is for all."""
    return Permissions(
        publish=(
            names.reply(name),
            names.upload(name, ">"),
            names.member(name),
            names.direct(f"KV_{names.members}", names.member(name)),
            names.next(names.tasks, token(name)),
            f"$JS.ACK.{names.tasks}.{token(name)}.>",
            names.direct(names.states, names.state(">")),
            names.direct(names.states, names.about),
            names.direct(names.uploads(name), names.upload(name, ">")),
        ),
        subscribe=(names.inbox(name) + ".>",),
    )


def streams_of(names: Names, participants: Sequence[ParticipantId]) -> tuple[str, ...]:
    """Names of all streams of a run; the first two are work queues."""
    return (names.tasks, names.replies, names.states, f"KV_{names.members}", *map(names.uploads, participants))


def coordinator_permissions(names: Names, participants: Sequence[ParticipantId]) -> Permissions:
    """The coordinator: everything of its run, and nothing else."""
    streams = streams_of(names, participants)
    verbs = ("CREATE", "UPDATE", "INFO", "PURGE")
    return Permissions(
        publish=(
            f"potluck.{names.run}.>",
            names.member(COORDINATOR),
            *(f"$JS.API.STREAM.{verb}.{stream}" for verb in verbs for stream in streams),
            "$JS.API.STREAM.NAMES",
            f"$JS.API.STREAM.MSG.DELETE.{names.tasks}",
            *(f"$JS.API.CONSUMER.NAMES.{stream}" for stream in streams[:2]),
            *(f"$JS.API.CONSUMER.{verb}.{stream}.>" for verb in ("CREATE", "INFO") for stream in streams[:2]),
            names.next(names.replies, COORDINATOR),
            f"$JS.ACK.{names.replies}.>",
            *(f"$JS.API.DIRECT.GET.{stream}.>" for stream in streams[2:]),
        ),
        subscribe=(names.inbox(COORDINATOR) + ".>",),
        owner=True,
    )


def watcher_permissions(names: Names) -> Permissions:
    """Whoever may only look: signs of life and what the run is about."""
    return Permissions(
        publish=(
            names.direct(f"KV_{names.members}", f"$KV.{names.members}.>"),
            names.direct(names.states, names.about),
        ),
        subscribe=(names.inbox("watcher") + ".>",),
    )


def permissions_of(names: Names, role: str, participants: Sequence[ParticipantId]) -> Permissions:
    """The permissions of ``coordinator``, ``watcher`` or a participant."""
    if role in participants:
        return participant_permissions(names, role)
    return coordinator_permissions(names, participants) if role == COORDINATOR else watcher_permissions(names)
