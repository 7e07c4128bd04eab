"""The part of a recipe that says where participants run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from potluck.recipe.table import Table, setting

if TYPE_CHECKING:
    from potluck.recipe.schema import Recipe


class InProcess(Table):
    """All participants in this process, one after the other."""

    kind: Literal["inprocess"] = setting("inprocess", "The embedded engine.")


class Nats(Table):
    """Participants on machines of their own, joined by a NATS server with JetStream: `potluck host`, `potluck join`."""

    kind: Literal["nats"] = setting("nats", "Real machines, over NATS.")
    start_with: int | None = setting(
        None, "How many must have joined before the first round; all if left out.", unit="participants", ge=1
    )
    heartbeat: float = setting(5.0, "Time between two signs of life of a participant.", unit="seconds", ge=0.05, le=60)
    silence: float = setting(
        30.0, "Without a sign of life for so long a participant is shown as silent.", unit="seconds", gt=0
    )
    inline_bytes: int = setting(
        256 * 1024,
        "Tensors of a message up to this size travel inside it, larger ones as a blob.",
        unit="bytes",
        ge=0,
        le=768 * 1024,
    )
    blobs: str = setting(
        "jetstream", "Where blobs lie: `jetstream`, or the URL of an object store such as `s3://bucket/prefix`."
    )
    replicas: int = setting(
        1, "Servers that hold each stream; more than 1 needs a cluster of as many.", unit="servers", ge=1, le=5
    )
    storage: int | None = setting(
        None, "What the server may keep on disk; left out: worked out from model and participants.", unit="bytes", ge=1
    )


Engine = Annotated[InProcess | Nats, Field(discriminator="kind")]
HOUR = 3600.0


def engine_faults(recipe: Recipe) -> Iterator[str]:
    """Sentences that say why a recipe and its engine do not go together."""
    if not isinstance(recipe.engine, Nats):
        without = [p.name for p in recipe.participants if p.source is None]
        if without:
            yield f"participants: {without[0]!r} has no source; only over nats do participants bring their own"
        return
    if recipe.data.split is not None:
        yield "data.split: over nats everybody holds its own text; name the participants in [[participants]]"
    if any(p.profile is not None for p in recipe.participants):
        yield "participants.profile: simulated devices go with the inprocess engine"
    if recipe.engine.silence <= recipe.engine.heartbeat:
        yield f"engine.silence {recipe.engine.silence:g}: must be longer than the heartbeat"
    if (recipe.engine.start_with or 1) > len(recipe.participant_names):
        yield f"engine.start_with {recipe.engine.start_with}: only {len(recipe.participant_names)} take part"
