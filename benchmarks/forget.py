"""Forgetting of TOFU's kind (arXiv 2401.06121) on the small base that knows a synthetic world.

The base (``tests/assets/world``) learns 40 further people, five facts each in four phrasings, beside half as many
sentences of its world; a second time without those who will be forgotten, by the same seed and schedule: the model that
never knew them. Every method gets the first model, the sentences to be forgotten and the others' sentences; what comes
out is held against the second model. A seed decides who is forgotten, and all orders.

**FQ**, forget quality: p-value that truth ratios are those of the model that never knew. **MU**, utility: harmonic mean
of probability, ROUGE and truth of the people who stay and of the base's world, six parts; a model of this size has no
real authors. **XS**, extraction strength; answers are one token here, so it is the share that is still the likeliest.
**said**, **refused**: share of free answers, to prompts that were never trained, that are the answer, or the refusal.
**relearning**: steps of fine-tuning on a tenth of what was forgotten until the rest has half its probability back; 51
is never.

Settings of each method, nine, were tried on people who are in no figure here (`benchmarks._forget_grid`). Where the one
with the highest FQ does not keep 95% of the utility, it stands beside the one that does, as "forgetting most".
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks._forget_methods import REFUSAL, REFUSING, Case, Forget, methods
from benchmarks._measure import Measurement, main, measured
from potluck.compose.base import Base, load_base
from potluck.corpus.world import Fact, facts
from potluck.edit.forgetting.losses import mean_nll
from potluck.edit.forgetting.quality import forget_quality, said_rate, told_of, truth_ratios
from potluck.edit.forgetting.questions import of_world
from potluck.edit.forgetting.relearning import Relearning, relearning_steps
from potluck.edit.forgetting.unlearning import question_rows
from potluck.edit.layout import layout_of
from potluck.edit.moments import key_moments
from potluck.edit.prompts import logits_of, rows_of

ASSET = Path(__file__).parents[1] / "tests/assets/world"
KNOWN = 200  # people of the base
MOST = "NPO, forgetting most"  # what refusal editing is held against
COMPARED = {  # method and setting, as `benchmarks._forget_grid` found
    "NPO": ("NPO", "rate 0.0001, 5 epochs"),
    MOST: ("NPO", "rate 0.0003, 5 epochs"),
    "GradDiff": ("GradDiff", "rate 0.0001, 5 epochs"),
    "GradDiff, forgetting most": ("GradDiff", "rate 0.0003, 5 epochs"),
    "KL": ("KL", "rate 0.0001, 5 epochs"),
    "KL, forgetting most": ("KL", "rate 0.0003, 5 epochs"),
    "SimNPO": ("SimNPO", "rate 0.0003, 20 epochs"),
    "IdkDPO": ("IdkDPO", "rate 0.0001, 5 epochs"),
    "IdkDPO, forgetting most": ("IdkDPO", "rate 0.0001, 20 epochs"),
    "RMU": ("RMU", "rate 0.001, 20 epochs"),
    "GA": ("GA", "rate 0.0001, 5 epochs"),
    "GA, going on": ("GA", "rate 0.0003, 20 epochs"),
    "as a stranger": ("as a stranger", "rate 0.0003, 20 epochs"),
    "refusal, alphaedit": ("refusal, alphaedit", "layers (3,), L2 2"),
    "refusal, memit": ("refusal, memit", "layers (3,), lambda 8000"),
    "refusal, wise": ("refusal, wise", "layer 3, margin 2"),
    "refusal, ft": ("refusal, ft", "layer 2, rate 0.0001"),
    "as `potluck forget` does": ("as `potluck forget` does", "by default"),
    "stranger": ("stranger", "layers (4,), L2 0.5"),
    REFUSING: (REFUSING, "layer 4, L2 0.5, then 5"),
    "stranger more firmly, then refusal": (REFUSING, "layer 4, L2 0.2, then 5"),  # whose worse seed was best
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        people, first: Who are learned, and the number of the first.
        splits: How many of them are forgotten.
        epochs: Of learning.
        world: Every so many-th sentence of the base's world is asked.
        methods: Names in `COMPARED`; all if empty.
    """

    people: int = 40
    first: int = KNOWN
    splits: Mapping[str, int]
    seeds: tuple[int, ...]
    epochs: int = 10
    world: int = 17
    methods: tuple[str, ...] = ()


SIZES = {
    "short": Size(splits={"forget10": 4}, seeds=(0,), methods=(MOST, REFUSING)),
    "full": Size(splits={"forget10": 4, "forget20": 8}, seeds=(0, 1, 2)),
}


def measure(size: Size) -> list[Measurement]:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for seed in size.seeds:
        for split, case in cases(size, seed):
            for name, method in compared(size).items():
                for figure, value in figures(case, method(case, seed), seed).items():
                    found.setdefault((split, name), {}).setdefault(figure, []).append(value)
    return [
        result
        for (split, name), runs in found.items()
        for result in judged(split, name, runs, found.get((split, MOST)))
    ]


def compared(size: Size) -> dict[str, Forget]:
    """All methods, after both models that nothing was done to."""
    found: dict[str, Forget] = {"as it was": lambda case, seed: case.base, "never knew": lambda case, seed: case.never}
    known = methods()
    return found | {
        name: known[method][setting]
        for name, (method, setting) in COMPARED.items()
        if not size.methods or name in size.methods
    }


def judged(
    split: str, name: str, runs: Mapping[str, list[float]], npo: Mapping[str, list[float]] | None
) -> list[Measurement]:
    """All figures of one method; of refusal editing and GA two have targets."""
    at_least, at_most = {}, {}
    if name == REFUSING and npo is not None:
        at_least = {"FQ": median(npo["FQ"]), "MU, of the model that never knew": 0.95}
    if name == "GA, going on":
        at_most = {"MU, of the model that never knew": 0.5}
    return [
        measured(f"{split}, {name}: {figure}", values, "", at_least=at_least.get(figure), at_most=at_most.get(figure))
        for figure, values in runs.items()
    ]


def cases(size: Size, seed: int) -> list[tuple[str, Case]]:
    asset = load_base(ASSET)
    asset.model.to("cuda" if torch.cuda.is_available() else "cpu")
    people = [facts(1, first=size.first + number) for number in range(size.people)]
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


def learned(
    asset: Base, new: Sequence[Fact], known: Sequence[Fact], epochs: int, seed: int, peak: float = 1e-3
) -> Base:
    """A copy of the base that has learned further people, and has not forgotten its world."""
    size = 32
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
        batch = rows_of(chosen, asset.vocabulary.end_of_text).to(model.device)
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
        "refused": said_rate(base, [(q.paraphrased_question, REFUSAL) for q in case.gone]),
        "relearning": float(relearning_steps(base, case.gone, knew, Relearning(learning_rate=5e-4, seed=seed))),
    }


if __name__ == "__main__":
    main(measure, SIZES)
