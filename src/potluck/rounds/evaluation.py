"""The shared state on every participant's held-out text, which stays where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from potluck.contribution import Contribution, HeldOutText, Task
from potluck.engine.protocol import Engine
from potluck.records.events import EventLog
from potluck.rounds.figures import wrong_evaluation
from potluck.rounds.receiving import Window, in_order
from potluck.rounds.state import SharedState
from potluck.untrusted import in_a_line

_SUMS = {"nats", "tokens", "bytes"}
Facts = dict[str, Any]


def evaluate_shared(engine: Engine, shared: SharedState, log: EventLog, deadline: float | None = None) -> Facts:
    """Ask everybody for the loss on its held-out text and write the ``evaluation`` event.

    Args:
        deadline: Seconds after which nobody is waited for.

    Returns:
        The event's fields. ``union`` is over those who answered, whom it names; ``None`` if nobody did.
    """
    found = measure_shared(engine, shared, deadline)
    log.write("evaluation", **found)
    return found


def measure_shared(engine: Engine, shared: SharedState, deadline: float | None = None) -> Facts:
    """The same without the event: its fields."""
    began, roster = engine.now(), engine.roster()
    evaluators = [name for name, info in roster.items() if info.evaluates]
    window = Window(None if deadline is None else began + deadline)
    sent = {engine.send(name, _task(engine, shared, name, deadline)): name for name in evaluators}
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    transfers: dict[str, dict[str, int]] = {}
    for reply in in_order(engine, sent, window, shared.arrived):
        name = reply.participant
        transfers[name] = {"down_bytes": reply.down_bytes, "up_bytes": reply.up_bytes}
        if reply.contribution is None:
            missing[name] = in_a_line(reply.reason)
            engine.cancel(reply.task)
            shared.downloads.forget(name)
        elif reason := _unusable(reply.contribution, shared, name, roster[name].held_out):
            missing[name] = reason
        else:
            header = reply.contribution.header
            results[name] = held_out(float(header["nats"]), int(header["tokens"]), int(header["bytes"]))
            shared.measured[name] = HeldOutText(int(header["tokens"]), int(header["bytes"]))
    return {
        "round": shared.revision,
        "participants": results,
        "union": {**union_of(results), "of": list(results)} if results else None,
        "missing": missing,
        "transfers": transfers,
        "seconds": engine.now() - began,
    }


def better(found: Facts, best: Facts) -> bool:
    """Whether an evaluation is better than another, on the texts of those who took part in both.

    Unions of different texts cannot be compared, and neither can evaluations that nobody took part in twice.
    """
    common = found["participants"].keys() & best["participants"].keys()
    if not common:
        return False
    now, then = (union_of({name: of["participants"][name] for name in common}) for of in (found, best))
    return bool(now["bits_per_byte"] < then["bits_per_byte"])


def _unusable(answer: Contribution, shared: SharedState, name: str, held: HeldOutText | None) -> str:
    """Why an answer is no evaluation; empty if it is one."""
    if (answer.kind, answer.revision) != ("evaluate", shared.revision) or not answer.header.keys() >= _SUMS:
        return "not an evaluation of this state"
    return wrong_evaluation(answer.header, held, shared.measured.get(name))


def _task(engine: Engine, shared: SharedState, name: str, deadline: float | None) -> Task:
    return Task(
        kind="evaluate",
        revision=shared.revision,
        tensors=shared.downloads.tensors(name, shared.given, shared.revision),
        state=shared.digest if engine.remote else "",
        seconds=deadline,
    )


def union_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The held-out loss on all texts as one."""
    nats, tokens, text_bytes = (sum(r[key] for r in results.values()) for key in ("nats", "tokens", "bytes"))
    return held_out(nats, tokens, text_bytes)


def held_out(nats: float, tokens: int, text_bytes: int) -> dict[str, Any]:
    """A held-out loss: the sums, and ``bits_per_byte = nats / (ln 2 x bytes)``."""
    bits = nats / (math.log(2) * text_bytes) if text_bytes else 0.0
    return {"nats": nats, "tokens": tokens, "bytes": text_bytes, "bits_per_byte": bits}
