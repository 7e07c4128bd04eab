"""The coordinator's end: an engine whose participants are elsewhere."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.contribution import (
    Contribution,
    Fields,
    Packed,
    ParticipantId,
    ParticipantInfo,
    Reply,
    Shelf,
    Task,
    TaskId,
)
from potluck.engine.nats.background import Background
from potluck.engine.nats.connection import Delivery
from potluck.engine.nats.frames import END, Frame, ReplyFacts, facts_of, read_frame, signed, task_name
from potluck.engine.nats.post import Post
from potluck.engine.nats.presence import Members
from potluck.engine.nats.refusals import SERVER, Refusals, Told, refusal
from potluck.engine.nats.run_status import Presence
from potluck.engine.nats.states import States
from potluck.engine.nats.subjects import COORDINATOR, participant_of
from potluck.engine.nats.under_way import Sent, UnderWay
from potluck.engine.protocol import Tasks
from potluck.errors import AlreadyServed, EngineError, PotluckError
from potluck.recipe.engine import Nats

if TYPE_CHECKING:
    from torch import Tensor

IDLE_SECONDS = 10.0  # without work on a task: it was lost
LEAVE_SECONDS = 2.0  # what was sent before a goodbye has come by then


class NatsEngine:
    """Runs participants on machines of their own.

    Args:
        post: Connection, keys, blobs.
        settings: The recipe's engine table.
        max_reply_bytes: No reply of the run is larger; one that announces more is refused unread.
        refused: Told of what did not come to count: whose it seemed to be, why, and how often that was by now, at the
            first, the tenth, the hundredth time. Called by ``receive``.
        presence: What is said of the run itself.
        mend: Makes anew what the server has lost of the run's streams, and says what that was.
    """

    remote = True

    def __init__(
        self,
        post: Post,
        members: Members,
        settings: Nats,
        max_reply_bytes: int,
        refused: Told,
        presence: Presence,
        mend: Callable[[], list[str]],
    ) -> None:
        self._post, self.members, self._settings = post, members, settings
        self.presence, self._mend = presence, mend
        self.max_reply_bytes, self.refused = max_reply_bytes, refused
        self._began, self._count = time.monotonic(), 0
        self._over = threading.Event()
        self._inbox: queue.Queue[Reply | PotluckError | tuple[ParticipantId, str, int]] = queue.Queue()
        self._refusals = Refusals(lambda who, why, count: self._inbox.put((who, why, count)))
        members.refused = self._refusals.add
        self._tasks = UnderWay()
        self._contested: set[ParticipantId] = set()  # told of already
        self._open: set[TaskId] = set()  # sent, and their reply neither received nor cancelled
        self._background = Background(min(64, len(members.of) + 2))
        self._states = States(post.blobs, self._background, self._over.is_set, self._inbox.put, self._refusals.add)
        self._forget_tasks(post.names.task("*"))  # of an earlier session; they are asked again
        self._packed: tuple[tuple[str, ...], Packed] | None = None
        for work in (self._listen, self._watch):
            threading.Thread(target=work, name=f"potluck{work.__name__}", daemon=True).start()

    def roster(self) -> Mapping[ParticipantId, ParticipantInfo]:
        """Everybody whom the recipe names, there or not."""
        return {
            name: ParticipantInfo(
                name=name,
                evaluates=member.said.get("evaluates", True) is True,
                holds=self.members.holds(name),
                held_out=self.members.held_out(name),
            )
            for name, member in self.members.of.items()
        }

    def now(self) -> float:
        """Seconds since the engine began; everybody's deadline is measured by this clock alone."""
        return time.monotonic() - self._began

    def send(self, to: ParticipantId, task: Task) -> TaskId:
        """Give a participant a task; to one that is not there it fails at once.

        Raises:
            StorageError: The server's store is full.
            EngineError: The server does not come back.
        """
        self._count += 1
        return self._send(self._count, to, task)

    def _send(self, number: TaskId, to: ParticipantId, task: Task) -> TaskId:
        self._open.add(number)
        reason = self.members.away(to, reading=task.kind == "words")
        if reason:  # by the last look; it may have become ready since, and have answered
            with suppress(EngineError):
                self.members.look()
            reason = self.members.away(to, reading=task.kind == "words")
        if reason:
            self._inbox.put(Reply(task=number, participant=to, status="failed", reason=reason))
            return number
        name, packed = task_name(task), self._pack(task)
        inline = packed.size <= self._settings.inline_bytes
        blob = None if inline else packed.fields["payload"]["sha256"]
        facts: dict[str, Any] = {
            "run": self._post.names.run,
            "task": name,
            "to": to,
            "message": packed.fields,
            "state": task.state,
        }
        facts["seconds"] = task.seconds
        frame = signed(self._post.seed, facts, b"".join(packed.parts) if inline else b"")
        ends = float("inf") if task.seconds is None else self.now() + task.seconds
        size = len(frame) + (0 if inline else packed.size)
        sent = Sent(number, to, name, self.now(), ends, size, blob, frame, time.monotonic())
        early, alone = self._tasks.add(sent)
        if early is not None:
            self._take_in(early, sent)
            return sent.id
        if alone:  # what it may have sent unasked is awaited by nobody
            self._clear(to)
        new = blob is not None and self._states.need(blob, packed, sent.id)
        sent.place = self._post.connection.store(self._post.names.task(to), frame)
        if new and blob is not None:
            self._states.store(blob)  # participants fetch it as it comes
        return sent.id

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply; ``None`` after ``timeout`` seconds.

        Raises:
            StorageError: The server has no room for the state that was sent.
            EngineError: It could not be stored otherwise.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                found = self._inbox.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(found, Reply):
                if found.task in self._open:
                    self._open.discard(found.task)
                    return found
                continue  # it was cancelled when it had come already
            if isinstance(found, PotluckError):
                raise found
            self.refused(*found)

    def cancel(self, task: TaskId) -> None:
        """Forget a task: a reply to it is refused, and it is taken out of its participant's queue."""
        self._open.discard(task)
        if (sent := self._tasks.numbered(task)) is None:
            return
        self._tasks.answered(sent)
        self._tasks.end(sent)
        self._states.release(sent.blob, sent.id)
        if sent.place is None:
            return
        try:  # this one alone: others of the same participant may be waited for
            which = {"seq": sent.place, "no_erase": True}
            self._post.connection.api(f"STREAM.MSG.DELETE.{self._post.names.tasks}", which, patience=5.0)
        except EngineError as error:
            if "no message found" not in str(error):  # it was acknowledged in the meantime
                self._refusals.add(SERVER, f"an old task could not be taken back: {error}")

    def _forget_tasks(self, subject: str) -> None:
        try:
            self._post.connection.api(f"STREAM.PURGE.{self._post.names.tasks}", {"filter": subject}, patience=5.0)
        except EngineError as error:
            self._refusals.add(SERVER, f"an old task could not be taken back: {error}")

    def saved(self, shelf: Shelf) -> Fields:
        """How many tasks were sent; all else is with the participants and at the server."""
        return {"sent": self._count}

    def restore(self, facts: Fields, shelf: Mapping[str, Tensor], tasks: Tasks) -> None:
        """Ask again, by the same names, for answers that participants have kept or are working on."""
        self._count = int(facts["sent"])
        for number, (to, task) in tasks.items():
            self._send(number, to, task)

    def end(self, reason: str, patience: float) -> None:
        """Tell everybody that the run is over, wait until those who are there have heard it, and leave no state."""
        for name in self.members.of:
            if self.members.presence(name) in ("ready", "working"):
                facts: dict[str, Any] = {"run": self._post.names.run, "task": END, "to": name, "reason": reason}
                self._post.connection.store(self._post.names.task(name), signed(self._post.seed, facts))
        until = time.monotonic() + patience
        while time.monotonic() < until:
            state = self._post.connection.api(f"STREAM.INFO.{self._post.names.tasks}")["state"]
            if not state["messages"]:
                break
            time.sleep(0.05)
        for digest in self._post.blobs.held(None):
            self._drop(None, digest)

    def close(self) -> None:
        """Stop listening."""
        self._over.set()
        self._background.close()
        self.presence.leave()

    # --- replies -----------------------------------------------------------------------------------

    def _listen(self) -> None:
        asked = self._post.names.next(self._post.names.replies, COORDINATOR)
        while not self._over.is_set():
            try:
                if (delivery := self._post.connection.take(asked, 2.0)) is not None:
                    self._sort(delivery)
            except PotluckError as error:
                self._refusals.add(SERVER, str(error))
                time.sleep(1.0)

    def _sort(self, delivery: Delivery) -> None:
        """A reply to its task; what belongs to none is refused."""
        name = participant_of(delivery.subject)
        try:
            frame = read_frame(delivery.data, self._post.keys.get(name, ""))
            task = self._expected(name, frame)
        except Exception as error:  # whatever a message does to its reader, it ends here
            self._refusals.add(name, refusal(error))
            delivery.done()
            return
        delivery.done()
        sent, replay = self._tasks.take(name, task, frame)
        if replay:
            self._refusals.add(name, f"replay: task {task} was answered before, or is over")
            if frame.blob is not None:
                self._background.submit(self._drop, name, frame.blob[0])
        elif sent is not None:
            self._take_in(frame, sent)

    def _expected(self, name: ParticipantId, frame: Frame) -> str:
        facts = facts_of(ReplyFacts, frame)
        if facts.run != self._post.names.run:
            raise EngineError("a reply of another run")
        if facts.sender != name:
            raise EngineError("a reply that says it is somebody else's")
        return facts.task

    def _take_in(self, frame: Frame, sent: Sent) -> None:
        """Fetch what belongs to a reply, then let it count once."""
        self._tasks.answered(sent)
        if frame.blob is None:
            self._finish(sent, self._reply(frame, sent, frame.payload))
        else:
            self._background.submit(self._fetch, frame, sent, *frame.blob)

    def _fetch(self, frame: Frame, sent: Sent, digest: str, size: int) -> None:
        path = self._post.folder / f"{sent.to}-{digest}.safetensors"
        try:
            if size > self.max_reply_bytes:
                raise EngineError(f"oversized: {size} bytes, at most {self.max_reply_bytes} are expected")
            give_up = lambda: self._over.is_set() or self.now() > sent.ends or not self._tasks.awaited(sent)  # noqa: E731
            self._post.blobs.get(sent.to, digest, size, path, give_up, lambda: self._ask_again(sent))
            reply = self._reply(frame, sent, path)
        except Exception as error:  # whatever a message does to its reader, it ends here
            reply = self._failed(sent, "rejected", refusal(error))
        finally:
            path.unlink(missing_ok=True)  # what is mapped stays until it is let go
        self._finish(sent, reply)
        self._drop(sent.to, digest)

    def _reply(self, frame: Frame, sent: Sent, payload: bytes | Path | None) -> Reply:
        facts, up_bytes = facts_of(ReplyFacts, frame), frame.size + (frame.blob[1] if frame.blob else 0)
        if facts.status != "ok":
            return replace(self._failed(sent, "failed", facts.reason), up_bytes=up_bytes)
        try:
            contribution = self._post.codec.unpack(facts.message, payload)
        except Exception as error:  # whatever a message does to its reader, it ends here
            return replace(self._failed(sent, "rejected", refusal(error)), up_bytes=up_bytes)
        if not isinstance(contribution, Contribution):
            return self._failed(sent, "rejected", "a task where a contribution was asked for")
        done = replace(self._failed(sent, "failed", ""), status="ok", contribution=contribution, up_bytes=up_bytes)
        return replace(done, lasting=True)

    def _failed(self, sent: Sent, status: Any, reason: str) -> Reply:
        return Reply(
            task=sent.id,
            participant=sent.to,
            status=status,
            reason=reason,
            down_bytes=sent.down_bytes,
            seconds=self.now() - sent.at,
        )

    def _finish(self, sent: Sent, reply: Reply) -> None:
        self._states.release(sent.blob, sent.id)
        if self._tasks.end(sent):
            self._inbox.put(reply)

    # --- states and members ------------------------------------------------------------------------

    def _pack(self, task: Task) -> Packed:
        """A task's bytes; the tensors of one state are packed once for all."""
        key = (task.state, *sorted(task.tensors))
        like = self._packed[1] if self._packed is not None and self._packed[0] == key else None
        packed = self._post.codec.pack(task, like)
        if task.tensors:
            self._packed = (key, packed)
        return packed

    def _drop(self, owner: ParticipantId | None, digest: str) -> None:
        try:
            self._post.blobs.drop(owner, digest)
        except PotluckError as error:
            self._refusals.add(owner or COORDINATOR, f"a blob could not be dropped: {error}")

    def _clear(self, owner: ParticipantId) -> None:
        try:
            self._post.blobs.clear(owner)
        except PotluckError as error:
            self._refusals.add(SERVER, f"uploads of {owner} could not be dropped: {error}")

    def _watch(self) -> None:
        """Look for signs of life and give them, and mend what the server has lost."""
        while not self._over.wait(min(1.0, self._settings.heartbeat)):
            try:
                if lost := self._mend():
                    self._refusals.add(
                        SERVER, f"lost: {', '.join(lost)}; made anew, and what was in it is asked for again"
                    )
                self.presence.tell_again()
                self.members.look()
                self.presence.renew()
                self._let_go()
                self._remind()
            except AlreadyServed as error:
                self._inbox.put(error)
                return
            except PotluckError as error:  # the connection says itself that the server is away
                self._refusals.add(SERVER, f"did not do what it should: {error}")

    def _let_go(self) -> None:
        """Whoever says that it leaves takes its open tasks with it; whoever shares its invite is told of."""
        for name in self.members.contested() - self._contested:
            self._contested.add(name)
            self._refusals.add(name, "another process with the same invite tried to take part, and was refused")
        for sent in self._tasks.those(lambda sent: self.members.gone(sent.to, LEAVE_SECONDS)):
            self._forget_tasks(self._post.names.task(sent.to))  # when it comes back, the next round is its first
            self._tasks.answered(sent)
            self._finish(sent, self._failed(sent, "failed", "it left before it answered"))

    def _remind(self) -> None:
        """Ask again whoever idles though it was asked, and bring again what somebody waits for: the server lost it."""
        idle = lambda sent: self.members.idle(sent.to, sent.asked, IDLE_SECONDS)  # noqa: E731
        for sent in self._tasks.those(idle, unanswered=True):
            self._ask_again(sent)
        for digest in {member.said.get("lacks", "") for member in self.members.of.values()}:
            self._states.bring_again(digest)

    def _ask_again(self, sent: Sent) -> None:
        """Put a task into its queue once more; who has answered it sends the same answer again."""
        if self._over.is_set() or time.monotonic() - sent.asked < IDLE_SECONDS:
            return
        sent.asked = time.monotonic()
        self._refusals.add(SERVER, f"lost: task {sent.name} of {sent.to}, or its answer; it is asked for again")
        sent.place = self._post.connection.store(self._post.names.task(sent.to), sent.frame, patience=5.0)
