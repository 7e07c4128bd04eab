"""The methods of `benchmarks.forget`, each with nine settings; `benchmarks._forget_grid` says which one is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from potluck.aggregation.statistics import Statistics
from potluck.compose.base import Base
from potluck.edit.facts import Edit
from potluck.edit.forgetting import losses
from potluck.edit.forgetting.commands import AtWork, Request, forgotten
from potluck.edit.forgetting.name_estrangement import Strangers, asked_as_edits, estranged
from potluck.edit.forgetting.quality import model_utility, utility_of
from potluck.edit.forgetting.questions import Question
from potluck.edit.forgetting.refusals import Editor, Refusing, refuse
from potluck.edit.forgetting.unlearning import Unlearning, unlearn
from potluck.edit.layout import layout_of
from potluck.edit.tuning import Tuning, fine_tune
from potluck.edit.weights import WeightSettings, weight_editor
from potluck.edit.wise import WiseSettings, edit_with_wise, wise_memory
from potluck.models.memory import install

REFUSING = "stranger, then refusal"  # what is judged
REFUSAL = "known"  # one word that this model knows, and no answer to anything
RATES, EPOCHS = (1e-4, 3e-4, 1e-3), (5, 10, 20)
LAYERS = ((4,), (3, 4), (3,))  # as `potluck edit locate` says


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
Settings = Mapping[str, Forget]  # by what they are


def methods() -> dict[str, Settings]:
    """All methods with their settings."""
    by_loss: dict[str, losses.Method] = {
        "GA": losses.GA,
        "GradDiff": losses.GRAD_DIFF,
        "KL": losses.KL,
        "NPO": losses.Npo(),
        "SimNPO": losses.SimNpo(),
        "IdkDPO": losses.IdkDpo(),
        "RMU": losses.Rmu(layer=2),
        "as a stranger": losses.AsStranger(),
    }
    found: dict[str, Settings] = {
        name: {
            f"rate {rate:g}, {epochs} epochs": _by_loss(loss, rate, epochs) for rate, epochs in product(RATES, EPOCHS)
        }
        for name, loss in by_loss.items()
    }
    l2 = {f"layers {layers}, L2 {weight:g}": (layers, weight) for layers, weight in product(LAYERS, (0.2, 0.5, 2.0))}
    found["stranger"] = {name: _stranger(*how) for name, how in l2.items()}
    found[REFUSING] = {
        f"layer 4, L2 {first:g}, then {second:g}": _stranger_refusing(first, second)
        for first, second in product((0.2, 0.5, 1.0), (0.5, 2.0, 5.0))
    }
    found["refusal, alphaedit"] = {
        name: _refusing(_in_weights(WeightSettings("alphaedit", layers, "prompt", null_weight=weight)))
        for name, (layers, weight) in l2.items()
    }
    found["refusal, memit"] = {
        f"layers {layers}, lambda {weight:g}": _refusing(
            _in_weights(WeightSettings("memit", layers, "prompt", moment_weight=weight))
        )
        for layers, weight in product(LAYERS, (1000.0, 3000.0, 8000.0))
    }
    found["as `potluck forget` does"] = {"by default": _by_default}
    found["refusal, wise"] = {
        f"layer {layer}, margin {margin:g}": _refusing(_beside(layer, WiseSettings(margin=margin)))
        for layer, margin in product((2, 3, 4), (2.0, 5.0, 10.0))
    }
    found["refusal, ft"] = {
        f"layer {layer}, rate {rate:g}": _refusing(_tuned(Tuning((layer,), learning_rate=rate)))
        for layer, rate in product((2, 3, 4), RATES)
    }
    return found


def _by_loss(method: losses.Method, rate: float, epochs: int) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        settings = Unlearning(epochs, 32, learning_rate=rate, seed=seed)
        return replace(case.base, model=unlearn(case.base, case.forget, case.retain, method, settings, (REFUSAL,)))

    return forget


def _by_default(case: Case, seed: int) -> Base:
    nowhere = Path(case.base.place)
    return forgotten(
        case.base, case.forget, case.retain, Request(nowhere, nowhere, nowhere, "grad-diff", nowhere, seed=seed)
    )[0]


def _refusing(editor: Callable[[Case, int], Editor]) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        return refuse(case.base, case.forget, editor(case, seed), Refusing((REFUSAL,), seed=seed))[0]

    return forget


def _in_weights(settings: WeightSettings) -> Callable[[Case, int], Editor]:
    def editor(case: Case, seed: int) -> Editor:
        def edit(base: Base, edits: Sequence[Edit]) -> object:
            own = replace(case.moments, base_hash=base.content_hash)
            return weight_editor(base, own, replace(settings, seed=seed), asked_as_edits(case.retain)).write(edits)

        return edit

    return editor


def _beside(layer: int, settings: WiseSettings) -> Callable[[Case, int], Editor]:
    def editor(case: Case, seed: int) -> Editor:
        def edit(base: Base, edits: Sequence[Edit]) -> object:
            memory = edit_with_wise(base, wise_memory(base, layer, replace(settings, seed=seed)), edits)
            module = memory.module().to(base.model.device)
            return AtWork(memory, install(base.model, layout_of(base.model).path(layer), module))

        return edit

    return editor


def _tuned(settings: Tuning) -> Callable[[Case, int], Editor]:
    return lambda case, seed: lambda base, edits: fine_tune(base, edits, replace(settings, seed=seed))


def _stranger(layers: tuple[int, ...], weight: float) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        settings = Strangers(layers, "prompt", null_weight=weight, seed=seed)
        return estranged(case.base, case.forget, case.retain, case.moments, settings)

    return forget


def _stranger_refusing(first: float, second: float) -> Forget:
    def forget(case: Case, seed: int) -> Base:
        editor = _in_weights(WeightSettings("alphaedit", (4,), "prompt", null_weight=second))
        return refuse(
            _stranger((4,), first)(case, seed), case.forget, editor(case, seed), Refusing((REFUSAL,), seed=seed)
        )[0]

    return forget
