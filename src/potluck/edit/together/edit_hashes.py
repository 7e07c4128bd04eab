"""Who claims which fact, without saying which: keyed hashes, what overlaps, what conflicts, and who wins.

A participant sends two hashes of each edit, of what it asks and of that with its answer, under a secret that all
participants share and the coordinator does not have: without the secret nobody can try out facts. Equal first hashes
are the same question; if the second are equal as well, the edits overlap, else they are in conflict.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from potluck.edit.facts import MAX_EDITS, Edit
from potluck.errors import EditError
from potluck.recipe.editing import Policy
from potluck.untrusted import load_json

HASH_BYTES = 32
MIN_SECRET_BYTES = 16
_SHOWN = 20  # conflicts in a message


@dataclass(frozen=True)
class Claim:
    """One edit as others see it.

    Attributes:
        number: Of the edit among its participant's, from 0.
        asks: Hash of what is asked.
        says: Hash of what is asked and what is answered.
        made_at: Seconds since 1970; 0 if it is not said.
    """

    participant: str
    number: int
    asks: bytes
    says: bytes
    made_at: float = 0.0

    @property
    def label(self) -> str:
        """Participant and number, for people."""
        return f"{self.participant} {self.number}"


@dataclass(frozen=True)
class Conflict:
    """Claims that answer one question differently, in the participants' order; ``kept`` is the one that is made."""

    claims: tuple[Claim, ...]
    kept: Claim | None


@dataclass(frozen=True)
class Resolution:
    """What came out.

    Attributes:
        left_out: By participant, the numbers of its edits that are not made.
        overlaps: Edits that somebody else makes as well.
        conflicts: Each question with several answers.
    """

    left_out: Mapping[str, tuple[int, ...]]
    overlaps: int
    conflicts: tuple[Conflict, ...]


@dataclass(frozen=True)
class Decisions:
    """What a person decided of conflicts: edits that are made, and edits that are not."""

    keep: frozenset[tuple[str, int]] = frozenset()
    drop: frozenset[tuple[str, int]] = frozenset()


def claims_of(name: str, edits: Sequence[Edit], secret: bytes, first: int = 0) -> list[Claim]:
    """A participant's claims; ``first`` is the number of its first edit."""

    def keyed(*parts: str) -> bytes:
        return hmac.digest(secret, json.dumps(["claim", *parts]).encode(), "sha256")

    return [
        Claim(name, first + i, keyed(edit.asks), keyed(edit.asks, edit.target.strip()), edit.made_at)
        for i, edit in enumerate(edits)
    ]


def claim_tensors(claims: Sequence[Claim]) -> dict[str, Tensor]:
    """Claims as tensors: ``asks`` and ``says`` uint8 ``(E, 32)``, ``made_at`` in µs and ``numbers`` int64 ``(E,)``."""

    def hashes(of: Sequence[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(of)), dtype=torch.uint8).view(-1, HASH_BYTES)

    return {
        "asks": hashes([claim.asks for claim in claims]),
        "says": hashes([claim.says for claim in claims]),
        "made_at": torch.tensor([round(claim.made_at * 1e6) for claim in claims], dtype=torch.int64),
        "numbers": torch.tensor([claim.number for claim in claims], dtype=torch.int64),
    }


def read_claims(name: str, tensors: Mapping[str, Tensor]) -> list[Claim]:
    """Claims of unknown origin; without tensors there are none.

    Raises:
        EditError: They are none, or too many.
    """
    if not tensors:
        return []
    try:
        asks, says, made_at, numbers = (tensors[key] for key in ("asks", "says", "made_at", "numbers"))
    except KeyError as error:
        raise EditError(f"{name}: claims without {error}") from None
    count = len(numbers) if numbers.ndim else 0
    forms = [(t.dtype, tuple(t.shape)) for t in (asks, says, made_at, numbers)]
    expected = [*2 * [(torch.uint8, (count, HASH_BYTES))], *2 * [(torch.int64, (count,))]]
    if forms != expected or count > MAX_EDITS:
        raise EditError(f"{name}: these are not the claims of at most {MAX_EDITS} edits")
    listed = numbers.tolist()
    if len(set(listed)) < count or min(listed, default=0) < 0:
        raise EditError(f"{name}: two claims have one number")
    rows = zip(listed, asks.numpy(), says.numpy(), made_at.tolist(), strict=True)
    return [Claim(name, number, bytes(ask), bytes(say), when / 1e6) for number, ask, say, when in rows]


def resolved(
    claims: Sequence[Claim],
    policy: Policy,
    order: Sequence[str],
    decisions: Decisions | None = None,
    where: str = "a file",
) -> Resolution:
    """Decide which edits are made: of what overlaps the first participant's, of what conflicts by policy.

    ``newest`` has the latest ``made_at``, and among equals the first participant; ``priority`` the first participant;
    ``reject`` makes none; ``ask`` makes what ``decisions`` say.

    Args:
        order: Participants, the first has priority.
        where: The file that decisions are read from, for the message.

    Raises:
        EditError: The policy is ``ask`` and a conflict is not decided, or decided twice.
    """
    place = {name: i for i, name in enumerate(order)}
    ranked = sorted(claims, key=lambda claim: (place[claim.participant], claim.number))
    questions: dict[bytes, list[Claim]] = {}
    for claim in ranked:
        questions.setdefault(claim.asks, []).append(claim)
    out: dict[str, list[int]] = {}
    conflicts: list[Conflict] = []
    open_ones: list[list[Claim]] = []
    overlaps = 0
    for group in questions.values():
        kept: Claim | None = group[0]
        if len({claim.says for claim in group}) > 1:
            kept = _winner(group, policy, decisions or Decisions(), open_ones)
            conflicts.append(Conflict(tuple(group), kept))
        for claim in group:
            overlaps += kept is not None and claim is not kept and claim.says == kept.says
            if claim is not kept:
                out.setdefault(claim.participant, []).append(claim.number)
    if open_ones:
        raise EditError(_undecided(open_ones), f"{_HOW % where}; then go on with the run")
    return Resolution({name: tuple(sorted(numbers)) for name, numbers in out.items()}, overlaps, tuple(conflicts))


def _winner(group: list[Claim], policy: Policy, decisions: Decisions, open_ones: list[list[Claim]]) -> Claim | None:
    """The claim that is made of a conflict; one that nobody decided is noted in ``open_ones``."""
    match policy:
        case "newest":
            return max(group, key=lambda claim: claim.made_at)  # the first of equals
        case "priority":
            return group[0]
        case "reject":
            return None
        case "ask":
            kept = [claim for claim in group if (claim.participant, claim.number) in decisions.keep]
            dropped = all((claim.participant, claim.number) in decisions.drop for claim in group)
            if len({claim.says for claim in kept}) > 1:
                both = " and ".join(claim.label for claim in kept)
                raise EditError(f"the decisions keep {both}, which contradict each other", "keep one of them")
            if not kept and not dropped:
                open_ones.append(group)
            return kept[0] if kept else None


_HOW = 'write {"keep": [["NAME", NUMBER], ...], "drop": [...]} to %s: of each conflict keep one edit, or drop all of it'


def _undecided(groups: Sequence[Sequence[Claim]]) -> str:
    lines = [" against ".join(claim.label for claim in group) for group in groups[:_SHOWN]]
    more = f", and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
    return f"{len(groups)} edits are in conflict (participant and number of the edit): {'; '.join(lines)}{more}"


def read_decisions(path: Path) -> Decisions:
    """Decisions from a JSON file, ``{"keep": [["ada", 3]], "drop": [["ben", 0], ["cleo", 7]]}``.

    If it is not there, nothing is decided.

    Raises:
        EditError: It cannot be read, or has another form.
    """
    try:
        if not path.exists():
            return Decisions()
        raw = load_json(path)
        if not isinstance(raw, dict) or not raw.keys() <= {"keep", "drop"}:
            raise ValueError("an object with `keep` and `drop`")
        return Decisions(*(frozenset(_pairs(raw.get(key, []))) for key in ("keep", "drop")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EditError(f"{path}: cannot be read as decisions ({error})", _HOW % path) from None


def _pairs(raw: object) -> Iterator[tuple[str, int]]:
    if not isinstance(raw, list):
        raise ValueError("a list of pairs of participant and number")
    for name, number in raw:
        if not isinstance(name, str) or type(number) is not int:
            raise ValueError(f"{[name, number]} is not a participant and a number")
        yield name, number


def read_secret(path: Path) -> bytes:
    """The secret that participants share, from a file.

    Raises:
        EditError: It cannot be read, or is too short to be one.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise EditError(f"{path}: cannot be read ({error.strerror})", "participants share one secret file") from None
    if len(secret) < MIN_SECRET_BYTES or math.log2(len(set(secret)) or 1) * len(secret) < 8 * MIN_SECRET_BYTES / 2:
        raise EditError(f"{path}: too short or too simple a secret", "for example `openssl rand -hex 32 > secret`")
    return secret
