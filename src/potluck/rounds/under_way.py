"""What is under way between two rounds, as a checkpoint holds it: late tasks, answers that came, the engine's clock.

A late task is saved without its tensors: it begins from the shared state of its revision, whose copy is saved once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from potluck.contribution import Fields, Shelf, Task, reply_facts, reply_of
from potluck.engine.protocol import Engine
from potluck.rounds.state import Late, SharedState
from potluck.updates.download import WHOLE

_TASK = ("kind", "revision", "parameters", "state", "seconds")


def saved(shared: SharedState, engine: Engine) -> tuple[Fields, dict[str, Tensor]]:
    """All of it as JSON and tensors."""
    shelf = Shelf()
    late = [
        {"id": number, "participant": item.participant, **{key: getattr(item.task, key) for key in _TASK}}
        for number, item in shared.late.items()
    ]
    begun = sorted({item.task.revision for item in shared.late.values()})
    facts = {
        "late": [{**entry, "parameters": dict(entry["parameters"])} for entry in late],
        "arrived": [reply_facts(reply, shelf) for reply in shared.arrived if reply.task in shared.late],
        "snapshots": [[revision, shelf.put(shared.snapshots[revision])] for revision in begun],
        "engine": engine.saved(shelf),
    }
    return facts, {name: tensor.contiguous() for name, tensor in shelf.tensors.items()}


def restore(shared: SharedState, engine: Engine, facts: Fields, tensors: Mapping[str, Tensor]) -> None:
    """Go on where ``saved`` left off: tasks that were not answered are under way again.

    Raises:
        KeyError, TypeError, ValueError: These are not what it told.
    """
    shared.snapshots = {int(revision): tensors[place] for revision, place in facts["snapshots"]}
    shared.late = {
        int(entry["id"]): Late(entry["participant"], Task(**{key: entry[key] for key in _TASK}))
        for entry in facts["late"]
    }
    shared.arrived = [reply_of(entry, tensors) for entry in facts["arrived"]]
    answered = {reply.task for reply in shared.arrived}
    whole = {revision: {WHOLE: theta} for revision, theta in shared.snapshots.items()}
    tasks = {
        number: (late.participant, replace(late.task, tensors=whole[late.task.revision]))
        for number, late in shared.late.items()
        if number not in answered
    }
    engine.restore(facts["engine"], tensors, tasks)
