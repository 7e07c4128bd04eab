"""Forgetting of TOFU's kind (arXiv 2401.06121) on the small base that knows a synthetic world.

The base (``tests/assets/world``) learns 40 further people, five facts each in four phrasings, beside half as many
sentences of its world; a second time without those who will be forgotten, by the same seed and schedule: the model that
never knew them. Every method gets the first model, the sentences to be forgotten and the others' sentences; what comes
out is held against the second model. A seed decides who is forgotten, and all orders.

**FQ**, forget quality: p-value that truth ratios are those of the model that never knew. **MU**, utility: harmonic mean
of probability, ROUGE and truth of the people who stay and of the base's world, six parts; a model of this size has no
real authors. **XS**, extraction strength; answers are one token here, so it is the share that is still the likeliest.
**said**: share of answers said freely, to prompts that were never trained. **relearning**: steps of fine-tuning on a
tenth of what was forgotten until the rest has half its probability back; 51 is never.

Rates and layers were chosen on people who are in no figure here (240 to 279).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks._measure import Measurement, main, measured
from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base, load_base
from potluck.corpus.world import Fact, facts
from potluck.edit.forgetting import losses
from potluck.edit.forgetting.commands import editor_named
from potluck.edit.forgetting.losses import mean_nll
from potluck.edit.forgetting.quality import (
    forget_quality,
    model_utility,
    said_rate,
    told_of,
    truth_ratios,
    utility_of,
)
from potluck.edit.forgetting.questions import Question, of_world
from potluck.edit.forgetting.refusals import Refusing, refuse
from potluck.edit.forgetting.relearning import Relearning, relearning_steps
from potluck.edit.forgetting.strangers import Strangers, estranged
from potluck.edit.forgetting.unlearning import Unlearning, question_rows, unlearn
from potluck.edit.layout import layout_of
from potluck.edit.moments import key_moments
from potluck.edit.prompts import logits_of, rows_of

ASSET = Path(__file__).parents[1] / "tests/assets/world"
KNOWN = 200  # people of the base
REFUSING = "stranger, then refusal"  # what is judged


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        people: Who are learned.
        splits: How many of them are forgotten.
        epochs: Of learning.
        world: Every so many-th sentence of the base's world is asked.
        methods: Names in `methods_of`; all if empty.
    """

    people: int = 40
    splits: Mapping[str, int]
    seeds: tuple[int, ...]
    epochs: int = 10
    world: int = 17
    methods: tuple[str, ...] = ()


SIZES = {
    "short": Size(splits={"forget10": 4}, seeds=(0,), methods=("NPO", REFUSING)),
    "full": Size(splits={"forget10": 4, "forget05": 2}, seeds=(0, 1, 2)),
}


@dataclass(frozen=True)
class Case:
    """One request to forget.

    Attributes:
        base: Knows everybody.
        never: Never knew who is to be forgotten.
        forget: Their sentences, in all phrasings; ``gone`` is one question for each of their facts.
        retain: The other people's sentences; ``kept`` and ``world`` are asked.
        moments: Of what shall stay.
    """

    base: Base
    never: Base
    forget: list[Question]
    gone: list[Question]
    retain: list[Question]
    kept: list[Question]
    world: list[Question]
    moments: Statistics

    def utility(self, base: Base) -> float:
        return model_utility([utility_of(base, self.kept), utility_of(base, self.world)])


Forget = Callable[[Case, int], Base]


def measure(size: Size) -> list[Measurement]:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for seed in size.seeds:
        for split, case in cases(size, seed):
            for name, method in (("as it was", _nothing), *methods_of(size).items()):
                for figure, value in figures(case, method(case, seed), seed).items():
                    found.setdefault((split, name), {}).setdefault(figure, []).append(value)
    return [
        result
        for (split, name), runs in found.items()
        for result in judged(split, name, runs, found.get((split, "NPO")))
    ]


def judged(
    split: str, name: str, runs: Mapping[str, list[float]], npo: Mapping[str, list[float]] | None
) -> list[Measurement]:
    """All figures of one method; of refusal editing and GA two have targets."""
    at_least, at_most = {}, {}
    if name == REFUSING and npo is not None:
        at_least = {"FQ": median(npo["FQ"]), "MU, of the model that never knew": 0.95}
    if name == "GA":
        at_most = {"MU, of the model that never knew": 0.5}
    return [
        measured(f"{split}, {name}: {figure}", values, "", at_least=at_least.get(figure), at_most=at_most.get(figure))
        for figure, values in runs.items()
    ]


def cases(size: Size, seed: int) -> list[tuple[str, Case]]:
    asset = load_base(ASSET)
    people = [facts(1, first=KNOWN + number) for number in range(size.people)]
    random.Random(seed).shuffle(people)
    known = facts(KNOWN)
    base = learned(asset, list(chain(*people)), known, size.epochs, seed)
    found = []
    for split, count in size.splits.items():
        gone, kept = list(chain(*people[:count])), list(chain(*people[count:]))
        never = learned(asset, kept, known, size.epochs, seed)
        retain = of_world(kept, told=4)
        said = [" ".join(f"{q.question} {q.answer}." for q in (*retain, *of_world(known, told=4)[::3]))]
        moments = key_moments(base, layout_of(base.model), range(layout_of(base.model).count), said, 64)
        asked = (of_world(gone, told=4), of_world(gone), retain, of_world(kept)[::3], of_world(known)[:: size.world])
        found.append((split, Case(base, never, *asked, moments)))
    return found


def learned(asset: Base, new: Sequence[Fact], known: Sequence[Fact], epochs: int, seed: int) -> Base:
    """A copy of the base that has learned further people, and has not forgotten its world."""
    size, peak = 32, 1e-3
    model = copy.deepcopy(asset.model)
    model.requires_grad_(True)
    rows, old = (question_rows(asset, of_world(some, told=4)) for some in (new, known))
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.0)
    order = [i for _ in range(epochs) for i in torch.randperm(len(rows), generator=draw).tolist()]
    total = -(-len(order) // size)
    for step in range(total):
        beside = torch.randint(len(old), (size // 2,), generator=draw).tolist()
        chosen = [rows[i] for i in order[step * size : (step + 1) * size]] + [old[i] for i in beside]
        batch = rows_of(chosen, asset.vocabulary.end_of_text)
        for group in adam.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 10, (total - step) / (0.7 * total))
        adam.zero_grad(set_to_none=True)
        mean_nll(logits_of(model, batch), batch.labels).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    model.requires_grad_(False)
    return replace(asset, model=model)


def figures(case: Case, base: Base, seed: int) -> dict[str, float]:
    asked = [(q.question, q.answer) for q in case.gone]
    told, knew = told_of(base, asked), float(told_of(case.base, asked).probabilities.mean())
    ratios, never = truth_ratios(base, case.gone), truth_ratios(case.never, case.gone)
    return {
        "FQ": forget_quality(ratios, never),
        "mean log truth ratio, less that of the model that never knew": float(ratios.log().mean() - never.log().mean()),
        "MU, of the model that never knew": case.utility(base) / max(case.utility(case.never), 1e-9),
        "XS": sum(told.extraction_strengths) / len(asked),
        "said": said_rate(base, [(q.paraphrased_question, q.answer) for q in case.gone]),
        "relearning": float(relearning_steps(base, case.gone, knew, Relearning(seed=seed))),
    }


def methods_of(size: Size) -> dict[str, Forget]:
    rates: dict[str, tuple[losses.Method, float, int]] = {
        "GA": (losses.GA, 5e-4, 10),
        "GA, stopped early": (losses.GA, 3e-4, 5),
        "GradDiff": (losses.GRAD_DIFF, 3e-4, 10),
        "KL": (losses.KL, 3e-4, 10),
        "NPO": (losses.Npo(), 3e-4, 5),
        "SimNPO": (losses.SimNpo(), 1e-3, 10),
        "IdkDPO": (losses.IdkDpo(), 3e-4, 10),
        "RMU": (losses.Rmu(layer=2), 5e-4, 10),
        "as a stranger": (losses.AsStranger(), 5e-4, 20),
    }
    found: dict[str, Forget] = {name: _by_loss(*how) for name, how in rates.items()}
    found |= {f"refusal, {name}": _by_editor(name) for name in ("alphaedit", "memit", "ft", "wise")}
    found |= {"stranger": _stranger, REFUSING: _stranger_refusing}
    return {name: method for name, method in found.items() if not size.methods or name in size.methods}


def _nothing(case: Case, seed: int) -> Base:
    return case.base


def _by_loss(method: losses.Method, rate: float, epochs: int) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        settings = Unlearning(epochs, learning_rate=rate, seed=seed)
        return replace(case.base, model=unlearn(case.base, case.forget, case.retain, method, settings, ("unknown",)))

    return forget


def _by_editor(name: str) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        return refuse(case.base, case.gone, editor_named(name, case.moments, (1, 2), seed), Refusing(seed=seed))[0]

    return forget


def _stranger(case: Case, seed: int) -> Base:
    return estranged(case.base, case.forget, case.retain, case.moments, Strangers(seed=seed))


def _stranger_refusing(case: Case, seed: int) -> Base:
    editor = editor_named("alphaedit", case.moments, (1, 2), seed)
    return refuse(_stranger(case, seed), case.gone, editor, Refusing(seed=seed))[0]


if __name__ == "__main__":
    main(measure, SIZES)
