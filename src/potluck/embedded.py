"""The participants' side of a run whose participants are all in this process."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from potluck.contribution import HeldOutText, ParticipantInfo
from potluck.corpus.batches import Batches, Seat, documents_drawn
from potluck.corpus.shards import Corpus, Holding, Shard, build_corpus
from potluck.corpus.tokenizer import Vocabulary
from potluck.edit.facts import usable_edits
from potluck.edit.layout import layout_of
from potluck.edit.together.edit_hashes import read_secret
from potluck.edit.together.maps import Maps, maps_of
from potluck.edit.together.site import Site
from potluck.engine.inprocess import InProcess
from potluck.errors import EditError, RecipeError
from potluck.local.network import Network, device_named, place
from potluck.local.optimizers import InnerOptimizer
from potluck.local_state import LocalState, new_state, restore_state, state_facts, state_tensors
from potluck.models.build import build_model
from potluck.models.shapes import check_context
from potluck.participant import Participant
from potluck.recipe import Recipe
from potluck.recipe.seeds import seed_of
from potluck.records.checkpoint import Checkpoint, load_checkpoint
from potluck.records.events import Listener
from potluck.records.folder import Variant, open_run
from potluck.rounds.sampling import asked_in
from potluck.run import Facts, Parts, Run
from potluck.updates.codec import wire_bytes
from potluck.updates.fragments import Fragment, fragments_of


@dataclass(frozen=True)
class Workplace:
    """What all runs of one recipe share: text, network, and the weights everyone starts from."""

    recipe: Recipe
    corpus: Corpus
    network: Network
    initial: Tensor


def prepare(recipe: Recipe, say: Callable[[str], None], corpus: Corpus | None = None) -> Workplace:
    """Build token shards and the network; the slow work before a run.

    Args:
        recipe: What is run.
        say: Told before slow work.
        corpus: The recipe's text, if it was opened before.

    Raises:
        CorpusError, ModelError, RecipeError, EditError: What a run would need is not there.
    """
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    device_named(recipe.compute.device)  # before any slow work
    for person in recipe.participants if recipe.editing is not None else ():
        if person.edits is not None:
            usable_edits(Path(person.edits), say)
    check_context(recipe.model, recipe.local.sequence_length)
    corpus = corpus or build_corpus(recipe, say)
    vocabulary = corpus.vocabulary
    model = build_model(recipe.model, vocabulary.size, vocabulary.end_of_text, recipe.seed)
    network = place(model, recipe.compute)
    return Workplace(recipe, corpus, network, network.flat.vector.cpu().clone())


class Embedded:
    """Everybody in this process: those who train with their batches, the others for evaluation.

    Args:
        workplace: Text and network.
        recipe: The variant's own recipe: that of the workplace but for who is asked and how often.
    """

    def __init__(self, workplace: Workplace, variant: Variant, recipe: Recipe) -> None:
        self.workplace, self.variant, self.recipe = workplace, variant, recipe
        self.fragments = fragments_in(workplace.network, recipe)
        if variant.kind != "together":  # facts are edited together or not at all
            recipe = self.recipe = recipe.model_copy(update={"editing": None})
        self.participants = _participants(workplace, recipe, variant, self.fragments)

    def engine(self) -> InProcess:
        """All participants, one after the other."""
        profiles = {p.name: p.profile for p in self.recipe.participants if p.profile is not None}
        everybody = self.participants.items()
        return InProcess(
            [_info(name, who.validation, self._holds(name)) for name, who in everybody],
            lambda name, task: self.participants[name].perform(task),
            wire_bytes,
            profiles if self.variant.kind == "together" else None,
            self.recipe.seed,
        )

    def identity(self) -> Facts:
        """Tokenizer, text, edits and the shapes of the network."""
        edits = {} if self.recipe.editing is None else {"edits": _edit_hashes(self.recipe)}
        return identity(self.workplace) | edits

    def maps(self) -> Maps:
        """Where the layers that the recipe edits lie in the shared state."""
        return edited_maps(self.workplace.network, self.recipe)

    def description(self) -> Facts:
        """Everybody's holding, and the machine."""
        holdings = self.workplace.corpus.holdings.values()
        return {
            "participants": [holding.facts for holding in holdings],
            "environment": environment(self.workplace.network),
        }

    def saved(self) -> tuple[Facts, Parts]:
        """Everything that those who train keep between rounds."""
        trainers = list(self._trainers())
        parts = {f"participant-{name}": state_tensors(p.state) for name, p in trainers}
        return {name: state_facts(p.state) for name, p in trainers}, parts

    def restore(self, checkpoint: Checkpoint) -> None:
        """Their state at a checkpoint."""
        for name, participant in self._trainers():
            facts = checkpoint.facts["participants"][name]
            restore_state(participant.state, checkpoint.parts[f"participant-{name}"], facts)

    def _holds(self, name: str) -> int:
        """Tokens of training text; the pooled run's trainer has everybody's."""
        holdings = self.workplace.corpus.holdings
        held = [holdings[name]] if name in holdings else holdings.values()
        return sum(len(holding.train.tokens) for holding in held)

    def _trainers(self) -> Iterator[tuple[str, Participant]]:
        return ((name, self.participants[name]) for name in self.variant.trainers)


def embedded_run(
    workplace: Workplace,
    variant: Variant,
    folder: Path,
    recipe: Recipe,
    listeners: tuple[Listener, ...] = (),
    checkpoint: Checkpoint | None = None,
) -> Run:
    """A run with all participants in this process; the arguments are those of `Embedded` and of `Run`."""
    side = Embedded(workplace, variant, recipe)
    return Run(side, workplace.initial, side.fragments, variant, folder, recipe, listeners, checkpoint)


def fragments_in(network: Network, recipe: Recipe) -> tuple[Fragment, ...]:
    """The parts of a network that a recipe exchanges in turn.

    Raises:
        RecipeError: It has too few layers for them.
    """
    try:
        return fragments_of([(entry.name, entry.shape) for entry in network.flat.manifest], recipe.fragments)
    except ValueError as error:
        raise RecipeError(f"rounds.streaming.fragments: {error}") from None


def edited_maps(network: Network, recipe: Recipe) -> Maps:
    """Where the layers that a recipe edits lie in a network's vector; none if it edits none.

    Raises:
        EditError, ModelError: They are not there, or it is not known where the model keeps facts.
    """
    if recipe.editing is None:
        return {}
    return maps_of(layout_of(network.model), network.flat.manifest, recipe.editing.layers, recipe.editing.at)


def site_in(
    network: Network,
    recipe: Recipe,
    name: str,
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    edits: str | None,
    secret: bytes | None,
) -> Site | None:
    """A participant's side of the edits of a recipe; ``None`` if there are none."""
    if recipe.editing is None:
        return None
    maps, length = edited_maps(network, recipe), recipe.local.sequence_length
    own = None if edits is None else Path(edits)
    return Site(name, network, vocabulary, recipe.editing, maps, own, secret, tokens, length, recipe.seed)


def environment(network: Network) -> dict[str, Any]:
    """Versions and device, as far as they bear on a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else platform.machine(),
        "precision": "bf16 autocast" if network.autocast else "fp32",
        "threads": torch.get_num_threads(),
    }


def documents_trained_on(folder: Path, name: str) -> list[str]:
    """Names of the documents of which a participant of a run has drawn tokens, up to the newest checkpoint."""
    recipe, _ = open_run(folder)
    holding = build_corpus(recipe).holdings[name]
    checkpoint = load_checkpoint(folder / "checkpoints", only="shared")
    return documents_drawn(holding.train, batches_of(recipe, holding), checkpoint.facts["participants"][name]["cursor"])


def batches_of(recipe: Recipe, holding: Holding) -> Batches:
    """A participant's training sequences, in the order that seed and name give them."""
    return Batches(holding.train.tokens, recipe.local.sequence_length, seed_of(recipe.seed, holding.name))


def identity(workplace: Workplace) -> Facts:
    """What must not change between a checkpoint and a run that goes on from it."""
    corpus = workplace.corpus
    return {
        "tokenizer": corpus.vocabulary.content_hash,
        "text": {name: holding.content_hash for name, holding in corpus.holdings.items()},
        "model": workplace.network.layout,
    }


def held_out_of(holding: Holding) -> Shard | None:
    """A participant's held-out text, if it has any."""
    return holding.validation if holding.validation.documents else None


def _info(name: str, validation: Shard | None, holds: int) -> ParticipantInfo:
    held = None if validation is None else HeldOutText(len(validation.tokens) - 1, validation.text_bytes)
    return ParticipantInfo(name=name, evaluates=held is not None, holds=holds, held_out=held)


def _participants(
    workplace: Workplace, recipe: Recipe, variant: Variant, fragments: tuple[Fragment, ...]
) -> dict[str, Participant]:
    """Everybody, for evaluation; those who train, with their batches; one more for the pooled run."""
    network, holdings = workplace.network, workplace.corpus.holdings
    optimizer = InnerOptimizer(recipe.local.optimizer, network.flat, network.model)
    batches = {name: batches_of(recipe, holding) for name, holding in holdings.items()}
    idle = LocalState(torch.empty(0))
    edits, secret = {p.name: p.edits for p in recipe.participants}, _secret(recipe)

    def editor(name: str, holding: Holding) -> Site | None:
        tokens = holding.train.tokens
        return site_in(network, recipe, name, workplace.corpus.vocabulary, tokens, edits.get(name), secret)

    everybody = {
        name: Participant(
            name,
            recipe,
            network,
            optimizer,
            (batches[name],),
            held_out_of(holding),
            new_state(network, optimizer, recipe, fragments) if name in variant.trainers else replace(idle),
            fragments,
            editor=editor(name, holding),
        )
        for name, holding in holdings.items()
    }
    if variant.kind == "pooled":
        (name,) = variant.trainers
        state = new_state(network, optimizer, recipe, fragments)
        drawn = _pooled(recipe, batches)
        everybody[name] = Participant(name, recipe, network, optimizer, drawn, None, state, fragments)
    return everybody


def _pooled(recipe: Recipe, batches: Mapping[str, Batches]) -> tuple[Batches | Seat, ...]:
    """What a pooled step draws from: one batch of everybody, or of each who is asked in the round."""
    if recipe.asked_per_round == len(batches):
        return tuple(batches.values())
    rounds, per_round = asked_in(recipe), recipe.local_steps * recipe.local.batch_size * recipe.local.accumulation
    return tuple(Seat(batches, rounds, place, per_round) for place in range(recipe.asked_per_round))


def _secret(recipe: Recipe) -> bytes:
    """The participants' secret; in one process it hides nothing from anybody."""
    if recipe.editing is not None and recipe.editing.secret is not None:
        return read_secret(Path(recipe.editing.secret))
    return hashlib.sha256(f"{recipe.name} {recipe.seed}".encode()).digest()


def _edit_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each participant's edits."""
    try:
        return {p.name: hashlib.sha256(Path(p.edits).read_bytes()).hexdigest() for p in recipe.participants if p.edits}
    except OSError as error:
        raise EditError(f"{error.filename}: cannot be read as edits ({error.strerror})") from None
