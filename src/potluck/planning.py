"""How long a run takes on a given link, and how often and in what form to exchange: ``potluck plan``, without torch.

An exchange blocks, or travels while local steps go on. With ``T`` its transfers both ways and ``overlap`` the time of
the local steps that go on meanwhile::

    transfer = latency + 8 bytes / bandwidth
    round = local steps + max(0, T - overlap)
    utilisation = local steps / round
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from potluck.measured import CODECS, RANDOM, TRAINED, Judgement, judged
from potluck.models.shapes import Shapes, parameter_shapes
from potluck.preflight import vocabulary_size
from potluck.recipe import Recipe
from potluck.recipe.outer import OuterNesterov, OuterSgd
from potluck.recipe.schema import ModelFolder
from potluck.recipe.sources import Profile
from potluck.recipe.updates import FullDownload, Overlap, Streaming, Updates
from potluck.traffic import Messages, exchanges
from potluck.updates.fragments import fragments_of

PERIODS = (1, 10, 30, 100, 300, 500)  # local steps between two exchanges of the same parameters
ENOUGH = 0.95  # of the time in local steps
ROUNDS_OF_MOMENTUM = 100
_OVERLAPS = (1, 5)  # more than 5 gains little (arXiv 2501.18512)


@dataclass(frozen=True)
class Setting:
    """One way to exchange, and what it costs on the link.

    Attributes:
        codec: Name of links and download; ``as in the recipe``, or one of the plan's.
        period: The local steps between two exchanges of the same parameters that were aimed at, H.
        local_steps: Local steps of a round; with P fragments H / P, rounded down.
        overlap: Local steps that go on while an exchange travels.
        rounds: For as many local steps as the recipe has in all, the last one perhaps shorter.
        outer_steps: Of each fragment.
        up_bytes, down_bytes: What a participant sends and gets in a round, mean over the fragments.
        round_seconds: Mean over the fragments.
        utilisation: Share of the time that is local steps.
        total_seconds: Of the run: all rounds and the first download, without evaluations.
        near: Whether its loss was measured near full precision's (`potluck.measured`); ``None`` if it was not measured.
        measured: The measurement that says so.
    """

    codec: str
    period: int
    local_steps: int
    fragments: int
    overlap: int
    rounds: int
    outer_steps: int
    up_bytes: int
    down_bytes: int
    round_seconds: float
    utilisation: float
    total_seconds: float
    near: bool | None
    measured: str


@dataclass(frozen=True)
class Plan:
    """What each setting costs, and the one to take.

    Attributes:
        settings: All, the least compressed first.
        current: The recipe's own.
        choice: The one to take; ``None`` if none was measured near full precision.
        reason: Why, in a sentence.
        tables: What of the recipe the choice changes: ``rounds`` and ``updates``.
    """

    settings: tuple[Setting, ...]
    current: Setting
    choice: Setting | None
    reason: str
    tables: dict[str, Any]


def transfer_seconds(size: int, megabits_per_second: float, latency_milliseconds: float) -> float:
    """Time until a message of ``size`` bytes is there."""
    return latency_milliseconds / 1e3 + 8 * size / (megabits_per_second * 1e6)


def round_seconds(compute: float, up_bytes: int, down_bytes: int, link: Profile, overlap: float = 0.0) -> float:
    """One round in the midst of many.

    Args:
        compute: Seconds of all its local steps.
        overlap: Seconds of those that go on while an exchange travels; 0 waits for it.
    """
    travel = transfer_seconds(up_bytes, link.uplink, link.latency)
    travel += transfer_seconds(down_bytes, link.downlink, link.latency)
    return compute + max(0.0, travel - overlap)


def predicted_seconds(recipe: Recipe, profiles: Mapping[str, Profile]) -> float:
    """What the virtual clock will show at the end of a run, if everybody is always there: evaluations included.

    Args:
        profiles: A device and link for each participant.
    """
    now, busy = 0.0, dict.fromkeys(profiles, 0.0)
    for exchange in exchanges(recipe, shapes_of(recipe)):
        arrivals = []
        for name, down in zip(exchange.names, exchange.down, strict=True):
            device = profiles[name]
            begins = max(now + transfer_seconds(down, device.downlink, device.latency), busy[name])
            leaves = begins + exchange.steps / device.steps_per_second
            busy[name] = leaves + exchange.overlap / device.steps_per_second
            arrivals.append(leaves + transfer_seconds(exchange.up, device.uplink, device.latency))
        now = max(arrivals)
    return now


def planned(recipe: Recipe, link: Profile) -> Plan:
    """Every setting on a link that all participants have, and the one to take.

    Raises:
        ModelError: The model or its tokenizer cannot be read.
        RecipeError: The model has too few layers for the recipe's fragments.
    """
    shapes, total = shapes_of(recipe), recipe.total_local_steps
    variants = {_cost(*variant, total, shapes, link): variant[0] for variant in _variants(recipe, shapes)}
    choice, reason = _choose(recipe, list(variants))
    own = next(name for name, updates in _codecs(recipe, shapes).items() if updates == recipe.updates)
    current = _cost(recipe, own, recipe.local_steps * recipe.fragments, total, shapes, link)
    tables = {}
    if choice is not None:
        rounds = variants[choice].rounds.model_dump(include={"count", "local_steps", "streaming"}, exclude_none=True)
        tables = {"rounds": rounds, "updates": variants[choice].updates.model_dump()}
    return Plan(tuple(variants), current, choice, reason, tables)


def shapes_of(recipe: Recipe) -> Shapes:
    """The model's parameters, as far as they decide what is sent."""
    return parameter_shapes(recipe.model, vocabulary_size(recipe))


def megabits(text: str) -> float:
    """A bandwidth such as ``20mbit``, ``1.5gbit`` or ``800kbit`` in Mbit/s; ``Mbit/s`` and ``Mbps`` are that, too.

    Raises:
        ValueError: with the accepted forms.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kmg])(?:bits?(?:/s|ps)?|bps)", text.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is not a bandwidth; write it like 20mbit, 800kbit or 1.5gbit")
    return float(found[1]) * {"k": 1e-3, "m": 1.0, "g": 1e3}[found[2]]


def milliseconds(text: str) -> float:
    """A delay such as ``50ms`` or ``0.1s`` in milliseconds.

    Raises:
        ValueError: with the accepted forms.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(m?)s", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a delay; write it like 50ms or 0.1s")
    return float(found[1]) * (1.0 if found[2] else 1e3)


def _variants(recipe: Recipe, shapes: Shapes) -> Iterator[tuple[Recipe, str, int]]:
    """The recipe with other codecs, fragments and periods that go together, with the codec's name and the period."""
    own, layouts = recipe.local_steps * recipe.fragments, _layouts(recipe, shapes)
    for codec, updates in _codecs(recipe, shapes).items():
        for streaming in layouts:
            fragments = streaming.fragments if isinstance(streaming, Streaming) else 1
            for period in sorted({*PERIODS, own}):
                steps = period // fragments
                if not 0 < steps <= recipe.total_local_steps:
                    continue
                count = -(-recipe.total_local_steps // steps)
                rounds = {"count": count, "local_steps": steps, "local_tokens": None, "streaming": streaming}
                tables = {**dict(recipe), "rounds": {**dict(recipe.rounds), **rounds}, "updates": updates}
                try:
                    yield Recipe.model_validate(tables), codec, period
                except ValidationError:  # settings that contradict each other, or the rest of the recipe
                    continue


def _codecs(recipe: Recipe, shapes: Shapes) -> dict[str, Updates]:
    """Links and download of each codec, the least compressed first.

    Where the recipe's downloads are in full, the plan's codecs come with smaller ones, too.
    """
    own, full = recipe.updates, FullDownload()
    codecs = {
        name: table if own.download == full else table.model_copy(update={"download": own.download})
        for name, table in CODECS.items()
        if own.download == full or table.download == full
    }
    if own not in codecs.values():
        codecs["as in the recipe"] = own

    def size(updates: Updates) -> int:
        rounds = recipe.rounds.model_copy(update={"streaming": None})
        messages = Messages(recipe.model_copy(update={"updates": updates, "rounds": rounds}), shapes)
        return messages.update(0) + messages.task("train", 0, 1)

    return dict(sorted(codecs.items(), key=lambda item: -size(item[1])))


def _layouts(recipe: Recipe, shapes: Shapes) -> list[Overlap | None]:
    """Blocking; the recipe's own; fragments, as many as it has or 4 if the layers allow, with less and more overlap."""
    own = recipe.rounds.streaming
    fragments = recipe.fragments if recipe.fragments > 1 else _most_fragments(shapes)
    base = own if isinstance(own, Streaming) else Streaming()
    streams = [base.model_copy(update={"fragments": fragments, "overlap": steps}) for steps in _OVERLAPS]
    return list(dict.fromkeys([None, own, *(streams if fragments > 1 else [])]))


def _most_fragments(shapes: Shapes) -> int:
    for count in range(Streaming().fragments, 1, -1):
        try:
            return len(fragments_of(shapes, count))
        except ValueError:  # too few layers
            continue
    return 1


def _cost(recipe: Recipe, codec: str, period: int, total_steps: int, shapes: Shapes, link: Profile) -> Setting:
    messages, steps, middle = Messages(recipe, shapes), recipe.local_steps, recipe.rounds.count // 2
    behind = max(1, round(len(recipe.participant_names) / recipe.asked_per_round))
    places = range(middle, middle + len(messages.fragments))
    ups = [messages.update(place) for place in places]
    downs = [messages.task("train", place + 1 - behind, place + 1) for place in places]
    compute, overlap = steps / link.steps_per_second, recipe.overlap / link.steps_per_second
    rounds = [round_seconds(compute, up, down, link, overlap) for up, down in zip(ups, downs, strict=True)]
    mean = sum(rounds) / len(rounds)
    begin = transfer_seconds(messages.task("evaluate", None, 0), link.downlink, link.latency)
    known = _judged(recipe, len(rounds))
    return Setting(
        codec=codec,
        period=period,
        local_steps=steps,
        fragments=len(rounds),
        overlap=recipe.overlap,
        rounds=recipe.rounds.count,
        outer_steps=recipe.rounds.count // len(rounds),
        up_bytes=sum(ups) // len(ups),
        down_bytes=sum(downs) // len(downs),
        round_seconds=mean,
        utilisation=compute / mean,
        total_seconds=begin + total_steps / link.steps_per_second + recipe.rounds.count * (mean - compute),
        near=known.near,
        measured=str(known),
    )


def _judged(recipe: Recipe, fragments: int) -> Judgement:
    """What was measured of a recipe's way to exchange. Momentum outside was measured over many outer steps only."""
    codec = next((name for name, updates in CODECS.items() if updates == recipe.updates), "")
    outer_steps = recipe.rounds.count // fragments
    if getattr(recipe.outer, "momentum", 0.0) and outer_steps < ROUNDS_OF_MOMENTUM:
        return Judgement(None)
    if not isinstance(recipe.outer, OuterSgd | OuterNesterov):
        return Judgement(None)
    start = TRAINED if isinstance(recipe.model, ModelFolder) else RANDOM
    period = recipe.local_steps * fragments
    return judged(start, codec, fragments, recipe.overlap, period, outer_steps)


def _choose(recipe: Recipe, settings: Sequence[Setting]) -> tuple[Setting | None, str]:
    """Of the settings measured near full precision the least aggressive that uses the time well, else the best used."""
    among, known = "", [setting for setting in settings if setting.near]
    if getattr(recipe.outer, "momentum", 0.0):
        among = f"; outer momentum was measured over {ROUNDS_OF_MOMENTUM} outer steps and more"
    if not known:
        few = "nothing was measured near full precision for so few outer steps or so many local steps between them"
        return None, f"{few}{among}: exchange in full precision, or take more rounds"
    codecs = list(dict.fromkeys(setting.codec for setting in settings))
    enough = [setting for setting in known if setting.utilisation >= ENOUGH]
    if enough:
        choice = min(enough, key=lambda s: (s.local_steps * s.fragments, codecs.index(s.codec), s.overlap))
        rule = "of what was measured near full precision, the least local steps between exchanges, then the least "
        return choice, f"{rule}compression, that reach {ENOUGH:.0%}{among}"
    reason = f"of what was measured near full precision none reaches {ENOUGH:.0%}, this one comes nearest{among}"
    return max(known, key=lambda s: s.utilisation), reason
