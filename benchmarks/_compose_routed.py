"""Ten adapters of unequal ranks behind a router that is not told whose text it reads."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._compose_merges import Losses, Row, losses
from benchmarks._compose_parts import Size
from benchmarks._silos import Stage
from potluck.compose.adapter import Adapter, save_adapter
from potluck.compose.lora import added, attached, train_adapter
from potluck.compose.routing.arrow import Arrow, arrow
from potluck.compose.routing.evidence import Evidence, by_evidence, token_profile
from potluck.compose.routing.ranks import Ranks, self_activated, train_ranks
from potluck.compose.training import Lesson, loss_on, train_part
from potluck.recipe.seeds import seed_of

ARROWS = (Arrow(1, 1.0), Arrow(3, 1.0), Arrow(10, 1.0), Arrow(10, 4.0), Arrow(10, 16.0))
EVIDENCE = (Evidence(None, 0.1), Evidence(None, 0.25), Evidence(None, 0.5), Evidence(4, 0.25))


def references(stage: Stage, adapters: Mapping[str, Adapter], size: Size, label: str) -> Iterator[Row]:
    """What routing and merging are judged by: the base, everybody's own adapter, and one trained on all text."""
    model = stage.base.model
    yield Row("base", None, "", losses(stage, stage.held_out, size.length, size.device))
    own: Losses = {}
    for name, adapter in adapters.items():
        with attached(model, adapter):
            own[name] = loss_on(model, stage.held_out[name], size.length, size.device)
    yield Row(f"own adapter, {label}", None, "told whose text it is", own)


def joint(stage: Stage, size: Size, rank: int, seed: int) -> Row:
    """One adapter trained on everybody's text in one place: as many tokens as all adapters together."""
    tokens = sum(size.lesson(len(own), 0).steps for own in stage.own.values())
    lesson = Lesson(
        max(1, tokens // len(stage.own)), size.batch_size, size.length, size.learning_rate, seed, size.device
    )
    adapter = train_adapter(stage.base, list(stage.own.values()), lesson, rank)
    with attached(stage.base.model, adapter):
        found = losses(stage, stage.held_out, size.length, size.device)
    return Row(f"joint adapter, rank {rank}", rank, "all text in one place", found)


def routed(stage: Stage, adapters: Mapping[str, Adapter], size: Size, label: str) -> Iterator[Row]:
    """Arrow and evidence, each at the setting that does best on the tuning texts."""
    profiles = {
        name: token_profile(own, stage.public, stage.base.model.config.vocab_size) for name, own in stage.own.items()
    }
    model, everybody = stage.base.model, len(adapters)
    chosen = _at_most(EVIDENCE, everybody)
    ways: dict[str, list[tuple[str, Any]]] = {
        "Arrow": [(str(s), lambda s=s: arrow(model, adapters, s)) for s in _at_most(ARROWS, everybody)],
        "evidence": [(str(s), lambda s=s: by_evidence(model, adapters, profiles, s)) for s in chosen],
    }
    for name, settings in ways.items():
        yield _best(stage, f"potluck {name}, {label}", settings, size)


def _at_most(settings: tuple[Any, ...], adapters: int) -> list[Any]:
    """Settings in which a token goes through no more adapters than there are."""
    return [replace(s, top_k=s.top_k and min(s.top_k, adapters)) for s in settings]


def ranks(stage: Stage, adapters: Mapping[str, Adapter], size: Size, seed: int) -> Iterator[Row]:
    """Every rank an expert: chosen by a router that learned on the public text, or by their own activation."""
    everybodys = sum(adapter.rank for adapter in adapters.values())
    lesson = Lesson(size.router_steps, 2 * size.batch_size, size.length, 1e-3, seed, size.device)
    for active in (everybodys // 4, everybodys):
        routers = train_ranks(stage.base, adapters, [stage.public], lesson, Ranks(active))
        with added(stage.base.model, routers):
            found = losses(stage, stage.held_out, size.length, size.device)
        yield Row(f"potluck rank-wise, {active} of {everybodys} ranks, trained on public text", None, "", found)
    with added(stage.base.model, self_activated(adapters, max(1, everybodys // 10))):
        found = losses(stage, stage.held_out, size.length, size.device)
    yield Row("potluck rank-wise, by own activation", None, f"{everybodys // 10} of {everybodys} ranks", found)


def _best(stage: Stage, name: str, settings: list[tuple[str, Any]], size: Size) -> Row:
    def measured(context: AbstractContextManager[Any], streams: Mapping[str, np.ndarray]) -> Losses:
        with context:
            return losses(stage, streams, size.length, size.device)

    def tuned(setting: tuple[str, Any]) -> float:
        return float(np.mean(list(measured(setting[1](), stage.tuning).values())))

    label, way = min(settings, key=tuned)
    return Row(name, None, label, measured(way(), stage.held_out))


def x_lora(stage: Stage, adapters: Mapping[str, Adapter], size: Size, seed: int) -> Row:
    """PEFT's X-LoRA over the same adapters, its classifier trained on the public text."""
    import torch
    from peft import XLoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, adapter in adapters.items():
            save_adapter(adapter, Path(place) / name)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=stage.base.model.config.hidden_size,
            xlora_depth=1,
            layerwise_scalings=True,
            adapters={str(number): str(Path(place) / name) for number, name in enumerate(adapters)},  # other names fail
        )
        plain = copy.deepcopy(stage.base.model)
        plain.config.use_cache = False
        torch.manual_seed(seed_of(seed, "x-lora"))
        model: Any = get_peft_model(plain, config)
    lesson = Lesson(size.router_steps, 2 * size.batch_size, size.length, 1e-3, seed, size.device)
    train_part(model, [stage.public], lesson)
    found = {name: loss_on(model, stream, size.length, size.device) for name, stream in stage.held_out.items()}
    return Row("PEFT X-LoRA, trained on public text", None, f"{size.router_steps} steps", found)
