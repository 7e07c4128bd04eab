"""Learning rate over the run's total local steps, as a fraction of its peak."""

from __future__ import annotations

import math

from potluck.recipe.local import Constant, Cosine, Schedule, WarmupStableDecay


def rate_factor(schedule: Schedule, step: int, total: int) -> float:
    """Fraction of the peak learning rate at local step ``step`` (from 0) of ``total``; `schedule_fault` is to be "".

    Warm-up is linear: ``(step + 1) / (warmup + 1)``. With ``t`` the share of the rest that is done,
    cosine is ``f + (1 - f)(1 + cos(pi t)) / 2``; warmup-stable-decay stays at 1 and ends with ``1 - sqrt`` down to
    ``f`` (Hägele et al., arXiv 2405.18392).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    match schedule:
        case Constant():
            return 1.0
        case Cosine(final_fraction=final):
            done = (step - warmup) / max(1, total - warmup)
            return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2
        case WarmupStableDecay(decay_fraction=fraction, final_fraction=final):
            length = decay_steps(fraction, total)
            done = (step - (total - length)) / length
            return 1.0 if done <= 0 else final + (1 - final) * (1 - math.sqrt(min(1.0, done)))


def decay_steps(fraction: float, total: int) -> int:
    """Local steps of the decay that ends a run of ``total``."""
    return max(1, round(fraction * total))


def schedule_fault(schedule: Schedule, total: int) -> str:
    """Why the phases of a schedule do not fit into ``total`` local steps; empty if they do.

    Where warm-up ran into the decay, the rate would fall from its peak to somewhere below within one step.
    """
    warmup = schedule.warmup_steps
    if warmup >= total:
        return f"local.schedule.warmup_steps {warmup}: the run has only {total} local steps"
    length = decay_steps(schedule.decay_fraction, total) if isinstance(schedule, WarmupStableDecay) else 0
    if warmup + length > total:
        return (
            f"local.schedule: {warmup} steps of warm-up and {length} of decay (decay_fraction of the run) "
            f"are more than the run's {total} local steps"
        )
    return ""
