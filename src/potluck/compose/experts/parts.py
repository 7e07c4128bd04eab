"""What a participant gives: its expert, what the router is to know of its text, and no text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from potluck.compose.base import Base
from potluck.errors import ModelError
from potluck.files import storing, write_text
from potluck.models.mixture import MAPS, Kind, feed_forwards
from potluck.tensors import load_tensors
from potluck.untrusted import load_json

WEIGHTS_FILE = "expert.safetensors"
FACTS_FILE = "expert.json"
EVIDENCE, EMBEDDING = "router.evidence", "router.embedding"
_MAX_FACTS_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Expert:
    """One participant's expert.

    Attributes:
        name: Whose it is.
        kind: ``full``, a feed-forward network of the anchor's size in each layer; or ``low-rank``, additions to it.
        rank: Of the additions; 0 if full.
        base_hash: Of the base that it was trained beside, `Base.content_hash`.
        public_hash: Of the public text that its evidence is held against, `stream_hash`.
        weights: ``layers.I.MAP.weight`` if full, ``layers.I.MAP.down`` and ``layers.I.MAP.up`` else.
        evidence: Log-odds of each token in its text against public text, ``(vocabulary,)``: its part of the router.
        embedding: Mean input of each layer's feed-forward network on its text, ``(layers, d)``: the domain embedding.
        about: How much text and how it was trained.
    """

    name: str
    kind: Kind
    rank: int
    base_hash: str
    public_hash: str
    weights: Mapping[str, Tensor]
    evidence: Tensor
    embedding: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, Any]:
        """As `MixtureConfig.experts` has it."""
        return {"name": self.name, "kind": self.kind, "rank": self.rank}

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but tensors."""
        hashes = {"base_hash": self.base_hash, "public_hash": self.public_hash}
        return {**self.shape, **hashes, "about": dict(self.about)}

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        return sum(tensor.numel() for tensor in self.weights.values())


def save_expert(expert: Expert, folder: Path) -> None:
    """Write an expert's folder.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    tensors = {**expert.weights, EVIDENCE: expert.evidence, EMBEDDING: expert.embedding}
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        write_text(folder / FACTS_FILE, json.dumps(expert.facts, indent=1))


def load_expert(folder: Path) -> Expert:
    """What `save_expert` wrote, for some base: `check_fits` holds it to one.

    Raises:
        ModelError: It is missing or damaged, or holds values that are not finite.
    """
    facts = _facts(folder / FACTS_FILE)
    try:
        tensors = load_tensors(folder / WEIGHTS_FILE)
        evidence, embedding = tensors.pop(EVIDENCE), tensors.pop(EMBEDDING)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{folder}/{WEIGHTS_FILE}: cannot be read ({error})", "was it written in full?") from None
    for name, tensor in {**tensors, EVIDENCE: evidence, EMBEDDING: embedding}.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ModelError(f"{folder}: {name} is not fp32, or holds NaN or infinite values")
    return Expert(**facts, weights=tensors, evidence=evidence, embedding=embedding)


def check_fits(base: Base, expert: Expert) -> None:
    """Refuse an expert that was trained beside another base, or whose tensors do not fit this one.

    Raises:
        ModelError: saying what differs.
    """
    if expert.base_hash != base.content_hash:
        hint = "all experts must be trained beside the same frozen base; train this one again on this base"
        raise ModelError(f"expert {expert.name}: not trained beside {base.place}, whose weights differ", hint)
    expected = weight_shapes(base, expert.kind, expert.rank)
    layers, width = len(expected) // len(MAPS) // (1 if expert.kind == "full" else 2), base.model.config.hidden_size
    expected |= {EVIDENCE: (base.model.config.vocab_size,), EMBEDDING: (layers, width)}
    given = {**expert.weights, EVIDENCE: expert.evidence, EMBEDDING: expert.embedding}
    found = {name: tuple(tensor.shape) for name, tensor in given.items()}
    if found != expected:
        wrong = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        here, there = found.get(wrong, "missing"), expected.get(wrong, "nothing of this name")
        raise ModelError(f"expert {expert.name}: {wrong} is {here}, and should be {there}", "is it damaged?")


def weight_shapes(base: Base, kind: Kind, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of an expert beside this base.

    Raises:
        ModelError: The base's feed-forward networks are of another kind.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for number, anchor in enumerate(feed_forwards(base.model).values()):
        for name in MAPS:
            rows, columns = getattr(anchor, name).weight.shape
            if kind == "full":
                shapes[f"layers.{number}.{name}.weight"] = (rows, columns)
            else:
                shapes[f"layers.{number}.{name}.down"] = (rank, columns)
                shapes[f"layers.{number}.{name}.up"] = (rows, rank)
    return shapes


def checked_name(name: str) -> str:
    """A name that can stand in a configuration, in a table and on a command line.

    Raises:
        ModelError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is no name for an expert", "use at most 64 letters, digits and . _ -")
    return name


def stream_hash(tokens: np.ndarray) -> str:
    """SHA-256 of a stream of token ids."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).data).hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    try:
        table = load_json(path, most_bytes=_MAX_FACTS_BYTES)
        facts = {key: table[key] for key in ("name", "kind", "rank", "base_hash", "public_hash", "about")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "name a folder that `potluck expert train` wrote"
        raise ModelError(f"{path.parent}: not an expert ({error})", hint) from None
    rank_fits = isinstance(facts["rank"], int) and (facts["rank"] == 0) == (facts["kind"] == "full")
    if facts["kind"] not in ("full", "low-rank") or not rank_fits or facts["rank"] < 0:
        raise ModelError(f"{path}: kind {facts['kind']!r} of rank {facts['rank']!r} is not known")
    checked_name(str(facts["name"]))
    return facts
