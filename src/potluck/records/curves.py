"""The events of a run folder or of a comparison folder as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from potluck.errors import CheckpointError, RunFolderError
from potluck.records.events import SCHEMA, Event, read_events
from potluck.records.folder import check_run
from potluck.untrusted import load_toml

T = TypeVar("T")
LONE = ("alone", "pooled")  # kinds of run with one trainer in one place: nothing travels, whatever is counted


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How well held-out text is predicted: ``bits_per_byte = nats / (bytes ln 2)``; ``None`` is not finite."""

    nats: float | None
    tokens: int
    bytes: int
    bits_per_byte: float | None


@dataclass(frozen=True, kw_only=True)
class ParticipantRecord:
    """What a participant holds."""

    name: str
    train_tokens: int
    train_bytes: int
    train_documents: int
    validation_tokens: int
    validation_bytes: int
    validation_documents: int
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class ContributionRecord:
    """One participant's answer in one round; ``loss`` is in nats per token."""

    round: int
    participant: str
    status: str
    reason: str = ""
    weight: float = 0.0
    loss: float | None = None
    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    examples: int = 0
    epoch: float = 0
    update_norm: float | None = None
    down_bytes: int = 0
    up_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One outer step; seconds are this round's, tokens are those of the run so far."""

    round: int
    revision: int
    asked: int
    contributors: int
    delta_norm: float | None
    total_tokens: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Held-out text after a round; round 0 is before training.

    ``tokens`` is what the run had trained on. ``missing`` says why a participant did not answer; ``union`` is over
    those who did, ``None`` if nobody did.
    """

    round: int
    tokens: int
    participants: Mapping[str, HeldOut]
    union: HeldOut | None
    missing: Mapping[str, str] = field(default_factory=dict)
    transfers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def union_over(self, texts: Sequence[str]) -> float | None:
        """Bits per byte of some participants' texts as one; ``None`` if one of them is missing or not finite."""
        if self.union is not None and set(texts) == set(self.participants):
            return self.union.bits_per_byte
        found = [self.participants[name] for name in texts if name in self.participants]
        if len(texts) == 1:
            return found[0].bits_per_byte if found else None
        nats, size = [item.nats for item in found if item.nats is not None], sum(item.bytes for item in found)
        return sum(nats) / (math.log(2) * size) if size and len(nats) == len(texts) else None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All that a run folder tells.

    Attributes:
        name: The recipe's name.
        planned_rounds: Rounds of the recipe; ``rounds`` holds those that were done.
        resumed: How often the run was continued.
        seconds: Wall time of the finished run.
    """

    name: str
    time: str
    potluck: str
    recipe_hash: str
    variant: str
    trainers: tuple[str, ...]
    participants: tuple[ParticipantRecord, ...]
    parameters: int
    planned_rounds: int
    local_steps: int | None
    tokens_per_step: int | None
    environment: Mapping[str, Any]
    contributions: tuple[ContributionRecord, ...]
    rounds: tuple[RoundRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    resumed: int
    finished: bool
    state_hash: str
    seconds: float

    @property
    def total_tokens(self) -> int:
        """Tokens all participants have trained on."""
        return self.rounds[-1].total_tokens if self.rounds else 0

    def transferred(self, direction: Literal["up_bytes", "down_bytes"], name: str | None = None) -> int:
        """Bytes to (``down``) or from one participant, or all of them, for training and evaluation."""
        trained = sum(int(getattr(c, direction)) for c in self.contributions if name in (None, c.participant))
        evaluated = sum(t[direction] for e in self.evaluations for who, t in e.transfers.items() if name in (None, who))
        return trained + evaluated

    @property
    def union_curve(self) -> list[float]:
        """Bits per byte of the union, always over the texts of the last evaluation."""
        return [value for _, value in self.union_points if value is not None]

    @property
    def union_points(self) -> list[tuple[int, float | None]]:
        """Tokens so far and bits per byte of the union; ``None`` where a text of the last evaluation is missing."""
        texts = list(self.evaluations[-1].participants) if self.evaluations else []
        return [(item.tokens, item.union_over(texts)) for item in self.evaluations]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one recipe: together, each participant alone, and on all text pooled."""

    together: RunRecord
    alone: Mapping[str, RunRecord]
    pooled: RunRecord | None


class SummaryRow(TypedDict):
    """Bits per byte of every model on one held-out text; ``None`` where there is no such model or evaluation."""

    text: str
    alone: float | None
    together: float | None
    pooled: float | None
    best_alone: float | None
    best_alone_by: str | None


class Summary(TypedDict):
    """What a comparison shows, as plain data for ``comparison.json``.

    ``union`` is over the held-out text of ``union_of``: those who evaluated every run. ``better_together`` of
    ``compared`` participants have a lower value together than alone on their own text. ``gain`` is best alone minus
    together on the union, ``behind_pooled`` together minus pooled, both in bits per byte.
    """

    finished: bool
    rows: list[SummaryRow]
    union: SummaryRow
    union_of: list[str]
    compared: int
    better_together: int
    together_below_best_alone: bool
    gain: float | None
    behind_pooled: float | None
    tokens: dict[str, Any]


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of ``potluck compare``."""
    return not (folder / "events.jsonl").exists() and (
        (folder / "comparison.json").exists() or (folder / "together" / "events.jsonl").exists()
    )


def read_run(folder: Path, end: int | None = None) -> RunRecord:
    """Read a run folder's events, up to byte ``end`` of the log, also of a run that goes on or was killed.

    Raises:
        RunFolderError: The folder is not that of a run, or of a later version of potluck.
        CheckpointError: The event log is damaged.
    """
    path = folder / "events.jsonl"
    if not path.is_file():
        check_run(folder)
        raise RunFolderError(f"{folder}: the run has not started yet", "wait for its first round")
    kinds: dict[str, list[Event]] = {}
    for event in read_events(path, end):
        kinds.setdefault(str(event["event"]), []).append(event)
    if "run_started" not in kinds:
        raise RunFolderError(f"{folder}: the run has not started yet", "wait for its first round")
    started = kinds["run_started"][-1]
    if started.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{folder}: its events have schema {started.get('schema')}, this potluck reads {SCHEMA}",
            "use the version of potluck that made the run",
        )
    try:
        return _run_record(_recipe_name(folder), started, kinds)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: an event is incomplete ({error})") from None


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder; participants whose run alone has not started are left out.

    Raises:
        RunFolderError: The folder is not that of a comparison, or its run together has not started.
        CheckpointError: An event log is damaged.
    """
    if not is_comparison(folder):
        raise RunFolderError(f"{folder}: not a comparison folder", "name a folder of `potluck compare`")
    alone = sorted(path.parent for path in folder.glob("alone/*/events.jsonl"))
    pooled = folder / "pooled"
    return Comparison(
        together=read_run(folder / "together"),
        alone={path.name: read_run(path) for path in alone if _has_started(path)},
        pooled=read_run(pooled) if _has_started(pooled) else None,
    )


def summary_table(comparison: Comparison) -> Summary:
    """Bits per byte of every run's last evaluation, on each participant's held-out text and on the union."""
    together, pooled = comparison.together, comparison.pooled
    names = [participant.name for participant in together.participants]
    rows = [_summary_row(comparison, (name,), name) for name in names]
    runs = [together, *comparison.alone.values(), *([pooled] if pooled else [])]
    measured = [set(run.evaluations[-1].participants) for run in runs if run.evaluations]
    common = tuple(name for name in names if all(name in who for who in measured))
    union = _summary_row(comparison, common, None)
    pairs = [(row["alone"], row["together"]) for row in rows]
    known = [(alone, shared) for alone, shared in pairs if alone is not None and shared is not None]
    gain = _difference(union["best_alone"], union["together"])
    return Summary(
        finished=all(run.finished for run in runs),
        rows=rows,
        union=union,
        union_of=list(common),
        compared=len(known),
        better_together=sum(shared < alone for alone, shared in known),
        together_below_best_alone=gain is not None and gain > 0,
        gain=gain,
        behind_pooled=_difference(union["together"], union["pooled"]),
        tokens={
            "together": together.total_tokens,
            "alone": {name: run.total_tokens for name, run in comparison.alone.items()},
            "pooled": pooled.total_tokens if pooled else None,
        },
    )


def lowest(row: SummaryRow) -> str:
    """The best of a row's numbers as it is shown, to three digits; empty if there is but one."""
    found = [row["alone"], row["together"], row["pooled"], row["best_alone"]]
    known = [value for value in found if value is not None]
    return f"{min(known):.3f}" if len(known) > 1 else ""


def comparison_headline(summary: Summary) -> str:
    """The comparison in two or three sentences."""
    union, sentences = summary["union"], []
    if summary["compared"]:
        sentences.append(
            f"Trained together, {summary['better_together']} of {summary['compared']} participants have a better "
            "model of their own held-out text than the one they train alone."
        )
    if union["together"] is not None and union["best_alone"] is not None:
        side = "below" if summary["together_below_best_alone"] else "not below"
        sentences.append(
            f"On {_whose(summary)} held-out text it reaches {union['together']:.3f} bits per byte, {side} the "
            f"{union['best_alone']:.3f} of the best model trained alone ({union['best_alone_by']})."
        )
    if union["pooled"] is not None and summary["behind_pooled"] is not None:
        where = "behind" if summary["behind_pooled"] >= 0 else "ahead of"
        sentences.append(
            f"That is {abs(summary['behind_pooled']):.3f} {where} the {union['pooled']:.3f} of one model "
            "trained on all text pooled."
        )
    if not summary["finished"]:
        sentences.append("Not every run is finished.")
    return " ".join(sentences)


def _whose(summary: Summary) -> str:
    if len(summary["union_of"]) == len(summary["rows"]):
        return "everyone's"
    return f"the {len(summary['union_of'])} of {len(summary['rows'])} participants'"


def mean_loss(contributions: Iterable[ContributionRecord]) -> float | None:
    """Training loss in nats per token, the mean over tokens; ``None`` if nobody has one."""
    known = [(item.loss, item.tokens) for item in contributions if item.loss is not None and item.status == "ok"]
    tokens = sum(count for _, count in known)
    return sum(loss * count for loss, count in known) / tokens if tokens else None


def _summary_row(comparison: Comparison, texts: Sequence[str], name: str | None) -> SummaryRow:
    values = {owner: _last_value(run, texts) for owner, run in comparison.alone.items()}
    ranked = sorted((value, owner) for owner, value in values.items() if value is not None)
    best, best_by = ranked[0] if ranked else (None, None)
    return SummaryRow(
        text="union" if name is None else name,
        alone=None if name is None else values.get(name),
        together=_last_value(comparison.together, texts),
        pooled=_last_value(comparison.pooled, texts) if comparison.pooled else None,
        best_alone=best,
        best_alone_by=best_by,
    )


def _last_value(run: RunRecord, texts: Sequence[str]) -> float | None:
    return run.evaluations[-1].union_over(texts) if run.evaluations else None


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _run_record(name: str, started: Event, kinds: Mapping[str, list[Event]]) -> RunRecord:
    rounds = tuple(_record(RoundRecord, event) for event in kinds.get("round", ()))
    tokens = {record.round: record.total_tokens for record in rounds}
    ends = kinds.get("run_finished", ())
    saved = kinds.get("checkpoint", ())
    given = dict(started)
    given |= {
        "name": name,
        "trainers": tuple(started["trainers"]),
        "participants": tuple(_record(ParticipantRecord, item) for item in started["participants"]),
        "planned_rounds": started["rounds"],
        "contributions": tuple(_record(ContributionRecord, event) for event in kinds.get("contribution", ())),
        "rounds": rounds,
        "evaluations": tuple(_evaluation(event, tokens) for event in kinds.get("evaluation", ())),
        "resumed": len(kinds.get("run_resumed", ())),
        "finished": bool(ends),
        "state_hash": saved[-1]["state_hash"] if saved else "",
        "seconds": ends[-1]["seconds"] if ends else 0.0,
    }
    return _record(RunRecord, given)


def _evaluation(event: Event, tokens: Mapping[int, int]) -> EvaluationRecord:
    participants = {name: _record(HeldOut, item) for name, item in event["participants"].items()}
    union = None if event["union"] is None else _record(HeldOut, event["union"])
    so_far = max((count for number, count in tokens.items() if number <= event["round"]), default=0)
    return _record(EvaluationRecord, {**event, "tokens": so_far, "participants": participants, "union": union})


def _record(kind: type[T], event: Mapping[str, Any]) -> T:
    """The dataclass ``kind`` from the keys it knows."""
    names = fields(kind)  # type: ignore[arg-type]
    required = [item.name for item in names if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in required if name not in event]
    if missing:
        raise ValueError(f"{event.get('event', kind.__name__)} has no {missing[0]}")
    return kind(**{item.name: event[item.name] for item in names if item.name in event})


def _has_started(folder: Path) -> bool:
    path = folder / "events.jsonl"
    return path.is_file() and any(event["event"] == "run_started" for event in read_events(path))


def _recipe_name(folder: Path) -> str:
    try:
        name = load_toml(folder / "recipe.toml").get("name")
    except (OSError, ValueError):
        name = None
    return str(name) if name else folder.absolute().name
