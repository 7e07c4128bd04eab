"""The shared state on every participant's held-out text, which stays where it is."""

from __future__ import annotations

import math
from typing import Any

from potluck.contribution import Task
from potluck.engine.protocol import Engine
from potluck.records.events import EventLog
from potluck.rounds.receiving import in_order
from potluck.rounds.state import SharedState


def evaluate_shared(engine: Engine, shared: SharedState, log: EventLog) -> float | None:
    """Ask everybody for the loss on its held-out text and write the ``evaluation`` event.

    Returns:
        Bits per byte of the union: all nats over all bytes; ``None`` if a participant with text did not answer.
    """
    began = engine.now()
    task = Task(kind="evaluate", revision=shared.revision, tensors={"parameters": shared.theta})
    sent = {engine.send(name, task): name for name, info in engine.roster().items() if info.evaluates}
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    transfers: dict[str, dict[str, int]] = {}
    for reply in in_order(engine, sent):
        transfers[reply.participant] = {"down_bytes": reply.down_bytes, "up_bytes": reply.up_bytes}
        header = reply.contribution.header if reply.contribution else {}
        if not header:
            missing[reply.participant] = reply.reason
        elif not math.isfinite(float(header["nats"])):
            missing[reply.participant] = "the loss is not finite"
        else:
            results[reply.participant] = held_out(float(header["nats"]), int(header["tokens"]), int(header["bytes"]))
    complete = bool(results) and not missing
    union = held_out(*(sum(r[key] for r in results.values()) for key in ("nats", "tokens", "bytes")))
    log.write(
        "evaluation",
        round=shared.revision,
        participants=results,
        union=union if complete else None,
        missing=missing,
        transfers=transfers,
        seconds=engine.now() - began,
    )
    return float(union["bits_per_byte"]) if complete else None


def held_out(nats: float, tokens: int, text_bytes: int) -> dict[str, Any]:
    """A held-out loss: the sums, and ``bits_per_byte = nats / (ln 2 x bytes)``."""
    bits = nats / (math.log(2) * text_bytes) if text_bytes else 0.0
    return {"nats": nats, "tokens": tokens, "bytes": text_bytes, "bits_per_byte": bits}
