"""Experts that were trained apart and put together, beside a mixture of the same shape that was trained jointly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from benchmarks._compose_merges import Losses, Row
from benchmarks._compose_parts import Size
from benchmarks._silos import Stage
from potluck.compose.experts.assembly import assembled, without
from potluck.compose.experts.parts import Expert
from potluck.compose.experts.training import fresh_mixture, train_expert
from potluck.compose.training import loss_on, only_training, train_part
from potluck.models.mixture import MixtureForCausalLM
from potluck.recipe.seeds import seed_of

ISOLATED, JOINT, LEFT = "potluck experts", "joint mixture", "opt-out: max |difference of logits|"


def low_rank_experts(stage: Stage, size: Size, seed: int) -> Iterator[Row]:
    """Experts of mixed ranks: isolated, one of them gone, and trained jointly."""
    return _experts(stage, size, seed, "mixed ranks", size.ranks)


def full_experts(stage: Stage, size: Size, seed: int) -> Iterator[Row]:
    """The same with experts as large as the base's feed-forward networks."""
    return _experts(stage, size, seed, "full size", (None,))


def _experts(stage: Stage, size: Size, seed: int, label: str, ranks: tuple[int | None, ...]) -> Iterator[Row]:
    mine = [
        train_expert(
            stage.base,
            own,
            stage.public,
            replace(size.lesson(len(own), seed_of(seed, "expert", name)), learning_rate=_rate(size, ranks)),
            name,
            ranks[number % len(ranks)],
        )
        for number, (name, own) in enumerate(stage.own.items())
    ]
    mixture = assembled(stage.base, mine, size.top_k)
    yield Row(f"{ISOLATED}, {label}, isolated", None, f"top {size.top_k}", _losses(mixture, stage, size))
    yield _opt_out(stage, mine, mixture, size, label)
    together = _joint(stage, mine, size, ranks, seed)
    yield Row(f"{JOINT}, {label}", None, "experts and router, all text in one place", _losses(together, stage, size))


def _rate(size: Size, ranks: tuple[int | None, ...]) -> float:
    """Full-size experts start from what the base has learned, and do better slowly."""
    return size.learning_rate if ranks[0] is not None else size.learning_rate / 3


def _losses(model: MixtureForCausalLM, stage: Stage, size: Size) -> Losses:
    return {name: loss_on(model, stream, size.length, size.device) for name, stream in stage.held_out.items()}


def _joint(
    stage: Stage, mine: list[Expert], size: Size, ranks: tuple[int | None, ...], seed: int
) -> MixtureForCausalLM:
    """The same shape from the same start, all experts and the router learning at once on as many tokens in all."""
    evidence = {expert.name: expert.evidence for expert in mine}
    shapes = [expert.shape for expert in mine]
    model = fresh_mixture(stage.base, shapes, evidence, experts_per_token=size.top_k, seed=seed)
    steps = sum(size.lesson(len(own), 0).steps for own in stage.own.values())
    lesson = replace(size.lesson(0, seed), steps=max(1, steps // len(mine)), learning_rate=_rate(size, ranks))
    learning = [*model.expert_parameters(), *model.router.parameters()]
    with only_training(model, learning):
        train_part(model, list(stage.own.values()), lesson)
    return model


def _opt_out(stage: Stage, mine: list[Expert], mixture: MixtureForCausalLM, size: Size, label: str) -> Row:
    """The first participant leaves; beside it the mixture of those who stay, assembled without it."""
    first, *others = mine
    left, never = without(mixture, first.name), assembled(stage.base, others, size.top_k)
    same = all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in zip(left.state_dict().values(), never.state_dict().values(), strict=True)
    )
    differences: Losses = {}
    with torch.inference_mode():
        for name, stream in stage.held_out.items():
            tokens = torch.from_numpy(np.asarray(stream[:256]))[None].to(left.device)
            gap = left(input_ids=tokens).logits - never.to(left.device)(input_ids=tokens).logits
            differences[name] = float(gap.abs().max()) if same else float("inf")
    return Row(f"{LEFT}, {label}", None, f"{first.name} leaves", differences)
