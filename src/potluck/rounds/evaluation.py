"""The shared state on every participant's held-out text, which stays where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from potluck.contribution import Task
from potluck.engine.protocol import Engine
from potluck.records.events import EventLog
from potluck.rounds.receiving import Window, in_order
from potluck.rounds.state import SharedState

_SUMS = {"nats", "tokens", "bytes"}


def evaluate_shared(engine: Engine, shared: SharedState, log: EventLog, deadline: float | None = None) -> float | None:
    """Ask everybody for the loss on its held-out text and write the ``evaluation`` event.

    Args:
        deadline: Seconds after which nobody is waited for.

    Returns:
        Bits per byte of the union: all nats over all bytes; ``None`` if a participant with text did not answer.
    """
    found = measure_shared(engine, shared, deadline)
    log.write("evaluation", **found)
    return None if found["union"] is None else float(found["union"]["bits_per_byte"])


def measure_shared(engine: Engine, shared: SharedState, deadline: float | None = None) -> dict[str, Any]:
    """The same without the event: its fields."""
    began = engine.now()
    evaluators = [name for name, info in engine.roster().items() if info.evaluates]
    window = Window(None if deadline is None else began + deadline)
    sent = {engine.send(name, _task(engine, shared, name, deadline)): name for name in evaluators}
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    transfers: dict[str, dict[str, int]] = {}
    for reply in in_order(engine, sent, window, shared.arrived):
        transfers[reply.participant] = {"down_bytes": reply.down_bytes, "up_bytes": reply.up_bytes}
        answer = reply.contribution
        header = answer.header if answer is not None else {}
        if answer is None:
            missing[reply.participant] = reply.reason
            engine.cancel(reply.task)
            shared.downloads.forget(reply.participant)
        elif (answer.kind, answer.revision) != ("evaluate", shared.revision) or not header.keys() >= _SUMS:
            missing[reply.participant] = "not an evaluation of this state"
        elif not math.isfinite(float(header["nats"])):
            missing[reply.participant] = "the loss is not finite"
        else:
            results[reply.participant] = held_out(float(header["nats"]), int(header["tokens"]), int(header["bytes"]))
    complete = bool(results) and not missing
    union = union_of(results)
    return {
        "round": shared.revision,
        "participants": results,
        "union": union if complete else None,
        "missing": missing,
        "transfers": transfers,
        "seconds": engine.now() - began,
    }


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
