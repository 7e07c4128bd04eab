"""Fusing frozen models: three language models of unequal shape, and four encoders of digits.

**Text.** Three participants each train a model of their own, of unequal width and depth, on the documentation of two
projects (the halves that `_silos` calls ``base``). The models are frozen and fused; the head is trained on text that
they have not seen (``own``), together over rounds, by `potluck train`. Judged on held-out text of the six projects, and
of two that nobody trained on.

**Images.** `_fusion_images`.
"""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import tomli_w
import torch
from rich.console import Console
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from benchmarks._measure import Measurement, main, measured
from benchmarks._silos import PLACE, Texts, texts
from potluck.commands import train
from potluck.compose.base import token_stream
from potluck.compose.fusion import attribution, fuse_models
from potluck.compose.training import Lesson, loss_on, train_part
from potluck.corpus.tokenizer import Vocabulary, pieces, vocabulary_from_words
from potluck.models.build import build_model, load_folder
from potluck.models.export import export_folder
from potluck.models.fused import FusedForCausalLM
from potluck.recipe.schema import Bpe, Shape
from potluck.records.curves import read_run

SHAPES = {
    "ada": Shape(layers=3, width=96, heads=4, feedforward=256, context=512),
    "bob": Shape(layers=4, width=128, heads=4, feedforward=352, context=512),
    "eve": Shape(layers=6, width=64, heads=4, feedforward=192, context=512),
}
PRIMARY = "bob"
_HOLDS = {"ada": (0, 5), "bob": (3, 4), "eve": (7, 8)}  # places of their projects among the ten, by name
_UNSEEN = (1, 9)
_LENGTH, _VOCABULARY = 128, 2048
_BATCH, _LEARNING_RATE = 4, 5e-3


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        part_steps: Steps in which a participant trains its own model.
        rounds, local_steps: Of the head.
        ablations: Also train heads in which something is missing.
        held_out: Tokens of each project that are judged.
        digits: Rounds, and steps of pre-training, of the images.
    """

    seeds: tuple[int, ...]
    part_steps: int
    rounds: int
    local_steps: int
    ablations: bool
    held_out: int
    digits: tuple[int, int]


SIZES = {
    "short": Size(seeds=(0,), part_steps=20, rounds=2, local_steps=3, ablations=False, held_out=2000, digits=(3, 30)),
    "full": Size(
        seeds=(0, 1, 2), part_steps=400, rounds=12, local_steps=10, ablations=True, held_out=12_000, digits=(40, 400)
    ),
}


@dataclass(frozen=True)
class Scene:
    """What a seed starts from.

    Attributes:
        folders: The participants' models.
        learn: For the head: text of each participant that its model has not seen.
        known, unseen: Held-out streams by project: of those that somebody trained on, and of the others.
        owner: Who trained on a project.
    """

    place: Path
    folders: Mapping[str, Path]
    models: Mapping[str, PreTrainedModel]
    mine: Mapping[str, list[str]]
    learn: Mapping[str, np.ndarray]
    known: Mapping[str, np.ndarray]
    unseen: Mapping[str, np.ndarray]
    owner: Mapping[str, str]


Losses = dict[str, dict[str, float]]


def measure(size: Size) -> list[Measurement]:
    return [*_text(size), *_images(size)]


def _text(size: Size) -> Iterator[Measurement]:
    found = [_of_seed(scene(seed, size), size) for seed in size.seeds]
    losses: list[Losses] = [one for one, _ in found]
    for way in losses[0]:
        for side in losses[0][way]:
            yield measured(f"{way}: {side}", [each[way][side] for each in losses], "nats per token")
    best_single = [{s: min(each[n][s] for n in SHAPES) for s in ("union", "unseen")} for each in losses]
    others = ("the probabilities' mean", "the best fixed mixture", "the logits' mean", "the model of its own project")
    rivals = {name: [each[name] for each in losses] for name in others if name in losses[0]}
    for name, rival in {"the best single model": best_single, **rivals}.items():
        for side in ("union", "unseen"):
            if side in rival[0]:
                ratios = [each["fused"][side] / r[side] for each, r in zip(losses, rival, strict=True)]
                yield measured(f"loss of fused by that of {name}: {side}", ratios, "", at_most=1.0)
    pooled = [each["fused"]["union"] / each["fused, pooled"]["union"] for each in losses]
    yield measured("loss of fused, trained together by pooled: union", pooled, "", at_most=1.01)
    for name, unit, limit in (
        ("largest difference to the primary at the start", "logits", 0.0),
        ("bytes up of a participant and round by those of the head", "", 1.02),
        ("parameters of the head by all", "", 0.05),
    ):
        yield measured(name, [facts[name] for _, facts in found], unit, at_most=limit)
    own = [facts["weight of the own model on own projects"] for _, facts in found]
    yield measured("weight of the own model on own projects", own, "share", at_least=1 / len(SHAPES))


def _of_seed(at: Scene, size: Size) -> tuple[Losses, dict[str, float]]:
    """Losses by way of predicting and side, and further facts."""
    losses = _baselines(at, size)
    shutil.rmtree(at.place / "fused", ignore_errors=True)
    facts = fuse_models(at.folders, at.place / "fused", PRIMARY, width=32)
    start = load_folder(at.place / "fused").eval()
    tokens = torch.from_numpy(next(iter(at.unseen.values()))[None, :200])
    with torch.inference_mode():
        moved = float((start(tokens).logits - at.models[PRIMARY](tokens).logits).abs().max())
    model, up_bytes = _trained_together(at, size)
    losses["fused"] = _both(at, lambda stream: loss_on(model, stream, _LENGTH, "cpu"))
    losses["fused, pooled"] = _pooled(at, size, ())
    if size.ablations:
        losses["fused, without track record"] = _pooled(at, size, ("attention.trust",))
        losses["fused, without attention"] = _pooled(at, size, ("attention.projections", "attention.prompt"))
        losses["fused, without residual"] = _pooled(at, size, ("residual",))
    weights = [attribution(model, stream)[at.owner[name]] for name, stream in at.known.items()]
    return losses, {
        "largest difference to the primary at the start": moved,
        "bytes up of a participant and round by those of the head": up_bytes / (4 * facts["parameters"]),
        "parameters of the head by all": facts["parameters"] / facts["frozen"],
        "weight of the own model on own projects": mean(weights),
    }


# --- scene ------------------------------------------------------------------------------------------


def scene(seed: int, size: Size) -> Scene:
    """Participants' models, trained if they are not there."""
    everybody = texts()
    names = sorted(everybody)
    mine = {who: [names[i] for i in places] for who, places in _HOLDS.items()}
    vocabulary = _vocabulary([everybody[n] for held in mine.values() for n in held])
    place = PLACE.parent / "fusion" / f"{names[0]}-{size.part_steps}-{seed}"
    folders = {who: place / who for who in SHAPES}
    for number, (who, shape) in enumerate(SHAPES.items()):
        if not folders[who].is_dir():
            model = build_model(shape, vocabulary.size, vocabulary.end_of_text, 10 * seed + number)
            stream = token_stream([text for n in mine[who] for text in everybody[n].base], vocabulary)
            lesson = Lesson(steps=size.part_steps, sequence_length=_LENGTH, seed=seed, device="cpu")
            train_part(model, [stream], lesson)
            table = Bpe(vocab_size=_VOCABULARY)
            export_folder(model, table, vocabulary.tokenizer, vocabulary.end_of_text, folders[who])

    def held_out(held: Sequence[str]) -> dict[str, np.ndarray]:
        return {n: token_stream(everybody[n].held_out, vocabulary)[: size.held_out] for n in held}

    for who, held in mine.items():
        lines = [json.dumps({"text": text}) for n in held for text in everybody[n].own if not text.isspace()]
        (place / f"{who}.jsonl").write_text("\n".join(lines))
    return Scene(
        place,
        folders,
        {who: load_folder(folder).eval() for who, folder in folders.items()},
        mine,
        {who: token_stream([t for n in held for t in everybody[n].own], vocabulary) for who, held in mine.items()},
        held_out([n for held in mine.values() for n in held]),
        held_out([names[i] for i in _UNSEEN]),
        {n: who for who, held in mine.items() for n in held},
    )


def _vocabulary(parties: Sequence[Texts]) -> Vocabulary:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    counts: collections.Counter[str] = collections.Counter()
    for piece in (piece for party in parties for text in party.base for piece in pieces(text)):
        counts.update(piece[begin:end] for _, (begin, end) in split(piece))
    return vocabulary_from_words(counts, _VOCABULARY)


# --- training the head --------------------------------------------------------------------------------


def _trained_together(at: Scene, size: Size) -> tuple[FusedForCausalLM, float]:
    """By `potluck train`; and the bytes that a participant sent in a round."""
    shutil.rmtree(at.place / "run", ignore_errors=True)
    recipe = {
        "name": "fuse",
        "data": {"shards": str(at.place / "shards"), "validation_bytes": 4000},
        "model": {"path": str(at.place / "fused")},
        "local": {
            "batch_size": _BATCH,
            "sequence_length": _LENGTH,
            "optimizer": {"kind": "adamw", "learning_rate": _LEARNING_RATE, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, size.rounds * size.local_steps // 10)},
        },
        "rounds": {"count": size.rounds, "local_steps": size.local_steps, "evaluate_every": size.rounds},
        "compute": {"device": "cpu"},
        "records": {"folder": str(at.place / "run")},
        "participants": [{"name": who, "source": {"jsonl": str(at.place / f"{who}.jsonl")}} for who in SHAPES],
    }
    path = at.place / "fuse.toml"
    path.write_text(tomli_w.dumps(recipe))
    result = train(path, (), Console(stderr=True, quiet=True))
    model = load_folder(Path(result["model"])).eval()
    assert isinstance(model, FusedForCausalLM)
    return model, mean(contribution.up_bytes for contribution in read_run(at.place / "run").contributions)


def _pooled(at: Scene, size: Size, without: Sequence[str]) -> dict[str, float]:
    """Trained on everybody's text in one place, as many steps; parts of the head may be held as they start."""
    model = load_folder(at.place / "fused")
    assert isinstance(model, FusedForCausalLM)
    for name, parameter in model.fusion.named_parameters():
        if name.startswith(tuple(without)):
            parameter.requires_grad_(False)
            if name == "attention.trust":
                parameter.data.zero_()
    steps = size.rounds * size.local_steps
    lesson = Lesson(steps=steps, batch_size=_BATCH, sequence_length=_LENGTH, learning_rate=_LEARNING_RATE, device="cpu")
    train_part(model, list(at.learn.values()), lesson)
    return _both(at, lambda stream: loss_on(model, stream, _LENGTH, "cpu"))


# --- what it is compared with -------------------------------------------------------------------------


def _baselines(at: Scene, size: Size) -> Losses:
    """Each model alone, means of all, the best fixed mixture, and on each project the model trained on it."""
    models = list(at.models.values())
    losses: Losses = {
        who: _both(at, lambda stream, m=model: loss_on(m, stream, _LENGTH, "cpu")) for who, model in at.models.items()
    }
    weights = _best_mixture(torch.cat([_gold(models, stream[: 2 * size.held_out]) for stream in at.learn.values()]))
    third = torch.full((len(models),), 1 / len(models))
    for name, mixture in (("the probabilities' mean", third), ("the best fixed mixture", weights)):
        log = mixture.log()
        losses[name] = _both(at, lambda s, log=log: -float(torch.logsumexp(_gold(models, s) + log, -1).mean()))
    losses["the logits' mean"] = _both(at, lambda stream: -float(_gold(models, stream, together=True).mean()))
    own = {name: loss_on(at.models[at.owner[name]], stream, _LENGTH, "cpu") for name, stream in at.known.items()}
    losses["the model of its own project"] = {"union": _weighted(own, at.known)}
    return losses


def _gold(models: Sequence[PreTrainedModel], stream: np.ndarray, together: bool = False) -> Tensor:
    """Log-probability of each token by each model, ``(T, M)``; ``together``: by the mean of logits, ``(T,)``."""
    rows = np.lib.stride_tricks.sliding_window_view(stream, _LENGTH + 1)[::_LENGTH]
    found = []
    with torch.inference_mode():
        for batch in torch.from_numpy(rows.copy()).split(32):
            logits = torch.stack([model(batch[:, :-1], use_cache=False).logits for model in models], dim=-1)
            log_probs = log_softmax(logits.mean(dim=-1, keepdim=True) if together else logits, dim=2)
            gold = batch[:, 1:, None, None].expand(-1, -1, 1, log_probs.shape[-1])
            found.append(log_probs.gather(2, gold).squeeze(2).flatten(0, 1))
    return torch.cat(found)


def _best_mixture(gold: Tensor) -> Tensor:
    """The fixed weights that fit best, by expectation and maximisation."""
    weights = torch.full(gold.shape[1:], 1 / gold.shape[1])
    for _ in range(200):
        weights = torch.softmax(gold + weights.log(), dim=-1).mean(dim=0)
    return weights


def _both(at: Scene, loss: Callable[[np.ndarray], float]) -> dict[str, float]:
    """Mean over the tokens of the known projects, and of the unseen ones."""
    sides = {"union": at.known, "unseen": at.unseen}
    return {side: _weighted({n: loss(s) for n, s in streams.items()}, streams) for side, streams in sides.items()}


def _weighted(losses: Mapping[str, float], streams: Mapping[str, np.ndarray]) -> float:
    return sum(loss * len(streams[name]) for name, loss in losses.items()) / sum(map(len, streams.values()))


# --- images -------------------------------------------------------------------------------------------


def _images(size: Size) -> Iterator[Measurement]:
    try:
        from benchmarks._fusion_images import accuracies

        found = [accuracies(seed, *size.digits) for seed in size.seeds]
    except ImportError as missing:
        yield measured("digits", [], "accuracy", peer=str(missing))
        return
    for way in found[0][0]:
        yield measured(f"digits, {way}", [accuracy[way] for accuracy, _ in found], "accuracy")
    single = [max(accuracy[name] for name in weights) for accuracy, weights in found]
    gains = [accuracy["AdaFusion"] - best for (accuracy, _), best in zip(found, single, strict=True)]
    yield measured("digits, AdaFusion above the best encoder", gains, "accuracy", at_least=0.0)
    for name in found[0][1]:
        yield measured(f"digits, attention to {name}", [weights[name] for _, weights in found], "share")


if __name__ == "__main__":
    main(measure, SIZES)
