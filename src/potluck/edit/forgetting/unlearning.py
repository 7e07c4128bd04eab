"""The loop of unlearning: rows of what is to be forgotten, each batch beside one of what shall stay."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from potluck.compose.base import Base
from potluck.edit.forgetting import losses
from potluck.edit.forgetting.losses import AsStranger, GradientAscent, IdkDpo, Method, Npo, Rmu, SimNpo
from potluck.edit.forgetting.quality import told_of
from potluck.edit.forgetting.questions import Question
from potluck.edit.forgetting.subjects import nobodies, renamed, with_subjects
from potluck.edit.layout import first, layout_of, watching
from potluck.edit.prompts import Row, Rows, answer_nll, logits_of, row, rows_of
from potluck.errors import EditError, NotFinite

PUBLISHED_RATE = 1e-5  # of models of 1 to 7 billion parameters
RATE_TIMES_WIDTH = 0.03
FORGOTTEN = 0.25  # of the mean probability of the answers, at most, is left
_CLIP = 1.0


def default_rate(base: Base) -> float:
    """A rate of AdamW that fits the model's width d, ``0.03 / d``, and never less than the published 1e-5.

    AdamW moves each weight by the rate, whatever the gradient, so that what a unit gets changes with rate and width.
    """
    return max(PUBLISHED_RATE, RATE_TIMES_WIDTH / layout_of(base.model).d_out)


@dataclass(frozen=True)
class Unlearning:
    """How it is done.

    Attributes:
        epochs: Passes over what is to be forgotten.
        batch_size: Questions that are forgotten in a step.
        learning_rate: Peak of AdamW (`default_rate` fits the model); the first epoch warms up, then it falls in a line.
        until: After which pass to stop: that which leaves so much of the mean probability, and no whole answer that
            would be said freely; after all passes if it is ``None``.
        mend: Whether a pass over retained questions follows, at half the rate and of at most so many steps as
            forgetting took: it brings back what went along. What it brings back of the rest is forgotten again.
        seed: Of the order, and of which retained questions go with which.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = PUBLISHED_RATE
    weight_decay: float = 0.01
    until: float | None = None
    mend: bool = False
    seed: int = 0


def unlearn(
    base: Base,
    forget: Sequence[Question],
    retain: Sequence[Question],
    method: Method,
    settings: Unlearning,
    refusals: Sequence[str] = (),
    on_step: Callable[[int], None] = lambda step: None,
) -> PreTrainedModel:
    """A copy of the model that has unlearned; the given one is the reference and stays as it is.

    Args:
        refusals: For `IdkDpo`: lines, of which each question gets one, drawn by the seed.

    Raises:
        EditError: Nothing is to be forgotten, or the method lacks what it needs.
        NotFinite: The loss became NaN or infinite.
    """
    _check(forget, retain, method, refusals)
    trained = copy.deepcopy(base.model)
    trained.train()
    trained.requires_grad_(True)
    task = _Task(base, trained, method, retain)
    adam = torch.optim.AdamW(trained.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    others = _counterparts(base, forget, retain, method, refusals, settings.seed)
    begin = math.ceil(len(forget) / settings.batch_size)
    total, enough, step = settings.epochs * begin, _enough(base, forget, settings), 0
    mends = settings.mend and bool(retain)
    for step, (lost, beside, kept) in enumerate(_steps(base, forget, retain, others, settings)):
        if step and step % begin == 0 and enough(trained):
            if not mends:
                break
            _mend(base, trained, (forget, retain), settings, step)
            if enough(trained):
                mends = False
                break
        on_step(step)
        rate = min((step + 1) / begin, (total - step) / max(1, total - begin), 1.0)
        for group in adam.param_groups:
            group["lr"] = rate * settings.learning_rate
        loss = task.loss(lost, beside, kept)
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss became {float(loss.detach())} in step {step + 1}", "lower the learning rate")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(trained.parameters(), _CLIP)
        adam.step()
    if mends:
        _mend(base, trained, (forget, retain), settings, step)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.parameters()):
        raise NotFinite("the weights became NaN or infinite", "lower the learning rate")
    trained.requires_grad_(False)
    trained.eval()
    return trained


def _mend(
    base: Base,
    trained: PreTrainedModel,
    questions: tuple[Sequence[Question], Sequence[Question]],
    settings: Unlearning,
    most: int,
) -> None:
    """Learn retained questions again, with moments of its own: the old ones point to what is to be forgotten.

    ``mean ℓ_R + mean max(0, m − ℓ_F)``: an answer that is forgotten is held at the margin m, so many nats a token that
    ``until`` of its probability is left.
    """
    gone, rows = (question_rows(base, part) for part in questions)
    draw = random.Random(settings.seed)
    order = draw.sample(range(len(rows)), len(rows))
    size, pad = settings.batch_size, base.vocabulary.end_of_text
    begins = range(0, len(order), size)[: max(1, most)]
    adam = torch.optim.AdamW(trained.parameters(), weight_decay=settings.weight_decay)
    for step, begin in enumerate(begins):
        for group in adam.param_groups:
            group["lr"] = settings.learning_rate / 2 * (len(begins) - step) / len(begins)
        batch = rows_of([rows[i] for i in order[begin : begin + size]], pad).to(trained.device)
        adam.zero_grad(set_to_none=True)
        losses.mean_nll(logits_of(trained, batch), batch.labels).backward()
        if settings.until is not None:
            lost = rows_of(draw.sample(gone, min(size, len(gone))), pad).to(trained.device)
            with torch.no_grad():
                margin = answer_nll(logits_of(base.model, lost), lost.labels) - math.log(settings.until)
            (margin - answer_nll(logits_of(trained, lost), lost.labels)).relu().mean().backward()
        clip_grad_norm_(trained.parameters(), _CLIP)
        adam.step()


def _enough(base: Base, forget: Sequence[Question], settings: Unlearning) -> Callable[[PreTrainedModel], bool]:
    """Whether a model has forgotten what `Unlearning.until` asks for."""
    until = settings.until
    if until is None:
        return lambda model: False
    asked = [(q.question, q.answer) for q in forget]
    knew = float(told_of(base, asked).probabilities.mean())

    def enough(model: PreTrainedModel) -> bool:
        model.eval()
        told = told_of(replace(base, model=model), asked)
        model.train()
        return float(told.probabilities.mean()) <= until * knew and not any(map(all, told.hits))

    return enough


@dataclass(frozen=True)
class _Task:
    """One method on one model.

    Attributes:
        base: The reference.
        trained: What learns to forget.
    """

    base: Base
    trained: PreTrainedModel
    method: Method
    retain: Sequence[Question]

    def loss(self, lost: Rows, beside: Rows | None, kept: Rows | None) -> Tensor:
        """``γ forget + α retain`` of one batch of each kind."""
        method = self.method
        if isinstance(method, Rmu):
            return self._rmu(method, lost, kept)
        total = method.gamma * self._forget(method, lost, beside)
        if kept is None or method.retain == "none":
            return total
        logits = logits_of(self.trained, kept)
        if method.retain == "nll":
            return total + method.alpha * losses.mean_nll(logits, kept.labels)
        return total + method.alpha * losses.kl_from(self._before(kept), logits, kept.mask)

    def _forget(
        self, method: GradientAscent | Npo | SimNpo | IdkDpo | AsStranger, lost: Rows, beside: Rows | None
    ) -> Tensor:
        logits = logits_of(self.trained, lost)
        nats = losses.answer_nats(logits, lost.labels)
        match method:
            case GradientAscent():
                return -losses.mean_nll(logits, lost.labels)
            case Npo():
                return losses.npo(nats, losses.answer_nats(self._before(lost), lost.labels), method.beta)
            case SimNpo():
                return losses.sim_npo(nats, (lost.labels != -100).sum(1), method.beta, method.delta)
            case IdkDpo():
                assert beside is not None
                won = losses.answer_nats(logits_of(self.trained, beside), beside.labels)
                won_before = losses.answer_nats(self._before(beside), beside.labels)
                before = losses.answer_nats(self._before(lost), lost.labels)
                return losses.idk_dpo(won, won_before, nats, before, method.beta)
            case AsStranger():
                assert beside is not None
                return losses.kl_at(self._before(beside), beside.labels, logits, lost.labels)

    def _rmu(self, method: Rmu, lost: Rows, kept: Rows | None) -> Tensor:
        width = layout_of(self.trained).d_out
        direction = losses.rmu_direction(width, method.seed).to(lost.ids.device)
        hidden = _hidden(self.trained, method.layer, lost)
        total = method.gamma * losses.rmu_forget(hidden, direction, method.scale, lost.labels)
        assert kept is not None
        with torch.no_grad():
            before = _hidden(self.base.model, method.layer, kept)
        now = _hidden(self.trained, method.layer, kept)
        return total + method.alpha * losses.rmu_retain(now, before, kept.labels)

    @torch.no_grad()
    def _before(self, rows: Rows) -> Tensor:
        return logits_of(self.base.model, rows)


def question_rows(base: Base, questions: Sequence[Question]) -> list[Row]:
    """Questions with their answers as tokens."""
    return [row(base.vocabulary, question.question, question.answer) for question in questions]


@dataclass(frozen=True)
class _Pair:
    """What goes with a question, and the tokens of both answers that are compared; all of them if none are named."""

    row: Row
    own: tuple[int, ...] = ()
    other: tuple[int, ...] = ()


def _counterparts(
    base: Base,
    forget: Sequence[Question],
    retain: Sequence[Question],
    method: Method,
    refusals: Sequence[str],
    seed: int,
) -> list[_Pair]:
    """What goes with each question: a refusal, or the same about somebody who does not exist."""
    draw = random.Random(seed)
    if isinstance(method, IdkDpo):
        return [_Pair(row(base.vocabulary, question.question, draw.choice(refusals))) for question in forget]
    if not isinstance(method, AsStranger):
        return []
    questions = with_subjects(forget)
    subjects = list(dict.fromkeys(question.subject for question in questions))
    names = nobodies([*subjects, *(q.subject for q in with_subjects(retain, strict=False) if q.subject)], seed)
    by_subject = {subject: draw.choice(names) for subject in subjects}
    return [_stranger_of(base, question, by_subject[question.subject]) for question in questions]


def _stranger_of(base: Base, question: Question, name: str) -> _Pair:
    """The question and its answer about somebody else; compared are the tokens of the answer that name neither."""
    asked = question.question.replace(question.subject, name)
    own = row(base.vocabulary, question.question, question.answer)
    other = row(base.vocabulary, asked, renamed(question.answer, question.subject, name))
    a, b = own.ids[own.prompt :], other.ids[other.prompt :]
    blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    alike = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    if not alike:
        return _Pair(row(base.vocabulary, asked, question.answer))
    return _Pair(other, tuple(i for i, _ in alike), tuple(j for _, j in alike))


def _steps(
    base: Base,
    forget: Sequence[Question],
    retain: Sequence[Question],
    others: list[_Pair],
    settings: Unlearning,
) -> Iterator[tuple[Rows, Rows | None, Rows | None]]:
    draw = torch.Generator().manual_seed(settings.seed)
    lost, kept = question_rows(base, forget), question_rows(base, retain)
    device, pad = base.model.device, base.vocabulary.end_of_text

    def batch(rows: Sequence[Row], counted: Sequence[tuple[int, ...]] = ()) -> Rows | None:
        return _only(rows_of(rows, pad), rows, counted).to(device) if rows else None

    for _ in range(settings.epochs):
        order: list[int] = torch.randperm(len(lost), generator=draw).tolist()
        for begin in range(0, len(order), settings.batch_size):
            places = order[begin : begin + settings.batch_size]
            paired = torch.randint(max(1, len(kept)), (len(places),), generator=draw).tolist()
            pairs = [others[i] for i in places] if others else []
            asked = batch([lost[i] for i in places], [pair.own for pair in pairs])
            assert asked is not None
            beside = batch([pair.row for pair in pairs], [pair.other for pair in pairs])
            yield asked, beside, batch([kept[i] for i in paired] if kept else [])


def _only(batch: Rows, rows: Sequence[Row], counted: Sequence[tuple[int, ...]]) -> Rows:
    """The same, with only these tokens of each answer asked for."""
    for i, places in enumerate(counted):
        if places:
            begin = rows[i].prompt - 1
            kept = batch.labels[i, [begin + place for place in places]]
            batch.labels[i] = -100
            batch.labels[i, [begin + place for place in places]] = kept
    return batch


def _hidden(model: PreTrainedModel, layer: int, rows: Rows) -> Tensor:
    found: list[Tensor] = []
    blocks = {0: layout_of(model).block(layer)}
    with watching(blocks, lambda key, entered, left: found.append(first(left))):
        model.base_model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False)
    return found[0].float()


def _check(forget: Sequence[Question], retain: Sequence[Question], method: Method, refusals: Sequence[str]) -> None:
    if not forget:
        raise EditError("nothing is to be forgotten")
    if (isinstance(method, Rmu) or (method.retain != "none" and method.alpha)) and not retain:
        raise EditError("this method needs questions whose answers shall stay", "name them with --retain")
    if isinstance(method, IdkDpo) and not refusals:
        raise EditError("IdkDPO needs refusals", "name a file of them with --refusals, one a line")
