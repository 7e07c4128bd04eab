"""Ten participants' texts and the base that they trained together: what the benchmarks of `compose` share.

The texts are the documentation of ten projects where it is there (``../shared/data/silos``, or a copy of it under
``runs/silos/texts``), else the source of ten installed packages. Each is cut by whole files: half for the base, which
is trained with `potluck train`, most of the rest for the participant's own part, and the last seventh is held out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from rich.console import Console

from potluck.commands import train
from potluck.compose.base import Base, load_base, texts_of, token_stream
from potluck.corpus.sources import documents
from potluck.recipe.sources import Package

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "runs" / "silos"
_GIVEN = ROOT.parent / "shared" / "data" / "silos"
_PACKAGES = (
    "stdlib",
    "torch",
    "transformers",
    "numpy",
    "sympy",
    "networkx",
    "pydantic",
    "pip",
    "rich",
    "huggingface_hub",
)
_PACKAGE_BYTES = 600_000
_TUNING_TOKENS = 2_049
_PIECE = 4_000  # characters; a run holds out whole documents, and some participants have few
_SHARES = (0.5, 0.35)  # of a participant's bytes: for the base, for its own part; the rest is held out


@dataclass(frozen=True)
class Texts:
    """One participant's documents: for the base, for its own part, and held out."""

    base: list[str]
    own: list[str]
    held_out: list[str]


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """The base and how long it is trained.

    Attributes:
        steps: Local steps of each participant, in all.
        batch_size: Sequences of one participant in a step.
    """

    vocabulary: int = 2048
    layers: int = 4
    width: int = 128
    heads: int = 4
    feedforward: int = 352
    steps: int = 300
    local_steps: int = 50
    batch_size: int = 4
    sequence_length: int = 128
    parties: int = 10


@dataclass(frozen=True)
class Stage:
    """All that a benchmark starts from.

    Attributes:
        base: Trained together on everybody's first half.
        own: Token ids that each participant trains its own part on.
        tuning: A little more of each participant's, for choosing settings: no part has seen it, and it is not held out.
        held_out: Token ids of each participant that nothing has seen.
        public: Everybody's first half, which the base has seen and everybody may use.
    """

    base: Base
    own: Mapping[str, np.ndarray]
    tuning: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    public: np.ndarray


def texts(parties: int = 10) -> dict[str, Texts]:
    """Everybody's documents, each on one side for good: the cut does not depend on a seed."""
    copy = PLACE / "texts"
    given = next((folder for folder in (copy, _GIVEN) if folder.is_dir()), None)
    if given is not None:
        found = {path.stem: texts_of(path) for path in sorted(given.glob("*.txt"))[:parties]}
    else:
        found = {name: _package(name) for name in _PACKAGES[:parties]}
    return {name: _cut(name, whole) for name, whole in found.items()}


def stage(seed: int, size: BaseSize, device: str = "cpu") -> Stage:
    """The base of this seed, trained with `potluck train` if it is not there, and everybody's tokens."""
    everybody = texts(size.parties)
    base = load_base(_trained_base(everybody, seed, size, device))
    whole = {name: token_stream(t.own, base.vocabulary) for name, t in everybody.items()}
    cut = {name: len(tokens) - min(_TUNING_TOKENS, len(tokens) // 8) for name, tokens in whole.items()}
    return Stage(
        base,
        own={name: tokens[: cut[name]] for name, tokens in whole.items()},
        tuning={name: tokens[cut[name] :] for name, tokens in whole.items()},
        held_out={name: token_stream(t.held_out, base.vocabulary) for name, t in everybody.items()},
        public=token_stream((text for t in everybody.values() for text in t.base), base.vocabulary),
    )


def _trained_base(everybody: Mapping[str, Texts], seed: int, size: BaseSize, device: str) -> Path:
    given = "docs" if (PLACE / "texts").is_dir() or _GIVEN.is_dir() else "packages"
    folder = PLACE / f"{given}-{'-'.join(str(value) for value in asdict(size).values())}-{seed}"
    if (folder / "model").is_dir():
        return folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, mine in everybody.items():
        path = folder / "base" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        pieces = (text[i : i + _PIECE] for text in mine.base for i in range(0, len(text), _PIECE))
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if not piece.isspace()))
    recipe = folder / "base.toml"
    recipe.write_text(tomli_w.dumps(_recipe(everybody, seed, size, device, folder)))
    result = train(recipe, (), Console(stderr=True, quiet=True))
    Path(result["model"]).rename(folder / "model")
    return folder / "model"


def _recipe(everybody: Mapping[str, Texts], seed: int, size: BaseSize, device: str, folder: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "base",
        "seed": seed,
        "data": {"shards": str(PLACE / "shards"), "validation_fraction": 0.1},
        "tokenizer": {"kind": "bpe", "vocab_size": size.vocabulary},
        "model": {
            "layers": size.layers,
            "width": size.width,
            "heads": size.heads,
            "feedforward": size.feedforward,
            "context": 512,
        },
        "local": {
            "batch_size": size.batch_size,
            "sequence_length": size.sequence_length,
            "optimizer": {"kind": "adamw", "learning_rate": 3e-3},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, size.steps // 20)},
        },
        "rounds": {
            "count": max(1, size.steps // size.local_steps),
            "local_steps": min(size.steps, size.local_steps),
            "evaluate_every": max(1, size.steps // size.local_steps),
        },
        "compute": {"device": device},
        "records": {"folder": str(folder / "run"), "checkpoint_every": max(1, size.steps // size.local_steps)},
        "participants": [
            {"name": name, "source": {"jsonl": str(folder / "base" / f"{name}.jsonl")}} for name in everybody
        ],
    }


def _cut(name: str, whole: list[str]) -> Texts:
    order = list(whole)
    random.Random(name).shuffle(order)
    total, done = sum(map(len, order)), 0
    sides: tuple[list[str], list[str], list[str]] = ([], [], [])
    for text in order:
        middle = (done + len(text) / 2) / total
        sides[0 if middle < _SHARES[0] else 1 if middle < sum(_SHARES) else 2].append(text)
        done += len(text)
    return Texts(*sides)


def _package(name: str) -> list[str]:
    kept, size = [], 0
    for document in documents(Package(package=name, order="shuffled")):
        if size > _PACKAGE_BYTES:
            break
        kept.append(document.text[:60_000])
        size += len(kept[-1])
    return kept
