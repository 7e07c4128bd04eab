"""Both ends of a question to a participant's model: the task ``predict``, and what answers it.

The participant's own model answers, not the run's shared one: that one everybody has. Token ids travel one way and
log-probabilities the other; whoever may ask for enough of them can learn the model, so a participant's policy must name
``predict``, and its part the model (`potluck.recipe.part`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from potluck.compose.decoding.models import Counts, Gold, NextToken, check_question
from potluck.compose.decoding.rows import packed_rows, unpacked_rows
from potluck.contribution import Contribution, ParticipantId, Reply, Task, TaskId
from potluck.errors import Damaged, EngineError, ModelError, TrainingError

KIND = "predict"
_MAX_NUMBERS = 1 << 26  # log-probabilities of one answer: 128 MiB


class Post(Protocol):
    """What is needed of an engine (`potluck.engine.protocol.Engine`)."""

    def send(self, to: ParticipantId, task: Task) -> TaskId:
        """Give a participant a task."""

    def receive(self, timeout: float | None = None) -> Reply | None:
        """The next reply; ``None`` after ``timeout`` seconds."""

    def cancel(self, task: TaskId) -> None:
        """Forget a task."""


class AtParticipant:
    """A participant's own model, behind any engine.

    Args:
        post: The engine; nothing else may be under way on it meanwhile.
        name: Of the participant.
        vocabulary: Tokens of the vocabulary that all share; the answers are held to it.
        top: Only so many of the likeliest tokens travel; 0 for all of them.
        seconds: How long an answer is waited for.
    """

    def __init__(self, post: Post, name: ParticipantId, vocabulary: int, top: int = 0, seconds: float = 60.0) -> None:
        self.name, self.vocabulary, self.whole = name, vocabulary, not 0 < top < vocabulary
        self.counts = Counts()
        self._post, self._top, self._seconds = post, top, seconds

    def log_probs(self, tokens: Sequence[int], positions: int = 1) -> Tensor:
        """The next token after each of the last prefixes, nats, ``(positions, V)``."""
        check_question(tokens, positions, self.vocabulary)
        answer = self._ask(tokens, positions, gold=False)
        return unpacked_rows(answer.tensors, positions, self.vocabulary)

    def gold(self, tokens: Sequence[int]) -> Gold:
        """How it foretells ``tokens[1:]``: two numbers a token travel."""
        check_question(tokens, 1, self.vocabulary)
        answer = self._ask(tokens, len(tokens) - 1, gold=True)
        log_p, right = answer.tensors.get("log_p"), answer.tensors.get("right")
        if log_p is None or right is None or log_p.dtype != torch.float32 or right.dtype != torch.uint8:
            raise Damaged(f"{self.name}: the answer says nothing of the text's own tokens")
        if log_p.shape != (len(tokens) - 1,) or right.shape != log_p.shape or not bool((log_p <= 1e-3).all()):
            raise Damaged(f"{self.name}: an answer of shape {tuple(log_p.shape)} for {len(tokens) - 1} tokens")
        return Gold(log_p, right.bool())

    def _ask(self, tokens: Sequence[int], positions: int, gold: bool) -> Contribution:
        task = question(tokens, positions, self._top, gold, self._seconds)
        with self.counts.asking(positions):
            sent = self._post.send(self.name, task)
            reply = self._post.receive(self._seconds)
            while reply is not None and reply.task != sent:  # one that was given up before
                reply = self._post.receive(self._seconds)
        if reply is None:
            self._post.cancel(sent)
            raise EngineError(f"{self.name} did not answer within {self._seconds:g} s")
        self.counts.sent_bytes += reply.down_bytes
        self.counts.received_bytes += reply.up_bytes
        if reply.contribution is None:
            hint = "it must allow `predict`, and name its own model in its part: predicts_with"
            raise EngineError(f"{self.name} did not foretell: {reply.reason}", hint)
        if reply.contribution.kind != KIND:
            raise Damaged(f"{self.name} answered something else: {reply.contribution.kind!r}")
        return reply.contribution


def question(tokens: Sequence[int], positions: int, top: int, gold: bool, seconds: float | None) -> Task:
    """The task ``predict``, named by its tokens: whoever asks the same gets the same answer."""
    ids = torch.tensor(tokens, dtype=torch.int64)
    named = hashlib.sha256(ids.numpy().data).hexdigest()
    about = {"positions": positions, "top": top, "gold": gold}
    return Task(kind=KIND, revision=0, parameters=about, tensors={"tokens": ids}, state=named, seconds=seconds)


def answered(model: NextToken, task: Task) -> Contribution:
    """The answer to a question of unknown origin.

    Raises:
        TrainingError: It is none, or asks for too much at once.
    """
    ids, about = task.tensors.get("tokens"), task.parameters
    positions, top = about.get("positions"), about.get("top")
    if ids is None or ids.dtype != torch.int64 or ids.ndim != 1 or type(positions) is not int or type(top) is not int:
        raise TrainingError("not a question about tokens")
    gold = about.get("gold") is True
    width = 1 if gold else top if 0 < top < model.vocabulary else model.vocabulary
    if positions * width > _MAX_NUMBERS:
        raise TrainingError(f"{positions} predictions at once are too many")
    tokens = ids.tolist()
    try:
        if gold:
            found = model.gold(tokens)
            tensors = {"log_p": found.log_p, "right": found.right.to(torch.uint8)}
        else:
            tensors = packed_rows(model.log_probs(tokens, positions), top)
    except ModelError as error:
        raise TrainingError(str(error)) from None
    return Contribution(kind=KIND, revision=task.revision, header={"tokens": len(tokens)}, tensors=tensors)
