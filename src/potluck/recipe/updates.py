"""The part of a recipe that says how updates travel: links, download, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from potluck.recipe.table import Table, setting

if TYPE_CHECKING:
    from potluck.recipe.schema import Recipe

# --- links ---------------------------------------------------------------------------------------


class Clip(Table):
    """Delta <- Delta min(1, norm / |Delta|)."""

    kind: Literal["clip"] = setting("clip", "Bound the norm of the pseudo-gradient.")
    norm: float = setting(..., "Largest norm.", gt=0)


class ErrorFeedback(Table):
    """e <- decay e + Delta; send C(e); e <- e - C(e), with C the links after it (arXiv 1901.09847)."""

    kind: Literal["error-feedback"] = setting(
        "error-feedback", "Keep what the links after it lose, and send it in later rounds."
    )
    decay: float = setting(1.0, "What is kept of the residual each round.", unit="per round", gt=0, le=1)


class TopK(Table):
    """The entries of largest magnitude of the whole vector, with 32-bit places."""

    kind: Literal["top-k"] = setting("top-k", "The largest entries of the whole vector.")
    density: float = setting(0.01, "Share of the entries that is sent.", unit="fraction", gt=0, le=1)


class BlockTopK(Table):
    """The k entries of largest magnitude of each block, with 12-bit places (SparseLoCo, arXiv 2508.15706)."""

    kind: Literal["block-top-k"] = setting("block-top-k", "The largest entries of each block (SparseLoCo).")
    k: int = setting(64, "Entries sent of each block.", unit="entries", ge=1, le=4096)
    block: int = setting(4096, "Entries of a block.", unit="entries", ge=2, le=4096)

    @model_validator(mode="after")
    def _k_in_block(self) -> BlockTopK:
        if self.k > self.block:
            raise ValueError(f"k {self.k} entries of a block of {self.block}")
        return self


class RandomK(Table):
    """Entries at random, the same for all participants in a round: places need not be sent."""

    kind: Literal["random-k"] = setting("random-k", "Random entries, drawn alike by all from the seed.")
    density: float = setting(0.01, "Share of the entries that is sent.", unit="fraction", gt=0, le=1)
    unbiased: bool = setting(
        True, "Scale what is sent by 1 / density, so that its mean is the vector; not below error feedback."
    )


class DctTopK(Table):
    """The k largest cosine coefficients of each chunk (DeMo, arXiv 2411.19870)."""

    kind: Literal["dct-top-k"] = setting("dct-top-k", "The largest cosine coefficients of each chunk (DeMo).")
    k: int = setting(32, "Coefficients sent of each chunk.", unit="coefficients", ge=1, le=4096)
    chunk: int = setting(64, "Side of a chunk; a matrix is cut into squares.", unit="entries", ge=2, le=64)


class LowRank(Table):
    """M ~ P Q^T by one step of subspace iteration from the last Q (PowerSGD, arXiv 1905.13727)."""

    kind: Literal["low-rank"] = setting("low-rank", "Factors of each matrix; vectors as they are (PowerSGD).")
    rank: int = setting(4, "Columns of the factors.", unit="columns", ge=1, le=1024)


class Quantize(Table):
    """Codes with a scale per block.

    8 and 4 bits: integers times (largest magnitude of the block) / 127 or 7. 2 bits: the sign and one of two
    magnitudes, the means below and above the block's median magnitude. Nothing is clipped.
    """

    kind: Literal["quantize"] = setting("quantize", "Integer codes with a scale per block.")
    bits: Literal[8, 4, 2] = setting(8, "Bits of a code.", unit="bits")
    block: int = setting(256, "Entries that share a scale.", unit="entries", ge=8, le=1 << 20, multiple_of=4)


class Codebook(Table):
    """256 uniform bins over 6 standard deviations, decoded by each bin's mean (INTELLECT-1, arXiv 2412.01152)."""

    kind: Literal["codebook"] = setting("codebook", "8-bit bins decoded by their mean (INTELLECT-1).")


class Sign(Table):
    """One bit an entry, times the block's mean magnitude (arXiv 1901.09847)."""

    kind: Literal["sign"] = setting("sign", "Signs with a scale per block.")
    block: int = setting(256, "Entries that share a scale.", unit="entries", ge=8, le=1 << 20, multiple_of=8)


LinkTable = Annotated[
    Clip | ErrorFeedback | TopK | BlockTopK | RandomK | DctTopK | LowRank | Quantize | Codebook | Sign,
    Field(discriminator="kind"),
]
SPARSE = (TopK, BlockTopK, RandomK, DctTopK, LowRank)
CODES = (Quantize, Codebook, Sign)

# --- download ------------------------------------------------------------------------------------


class FullDownload(Table):
    """What has changed since the participant's revision, in full precision."""

    kind: Literal["full"] = setting("full", "The parameters that changed, in fp32.")


class DeltaDownload(Table):
    """The differences since the participant's revision in fp32; zeros are not sent. Pays with sparse updates."""

    kind: Literal["delta"] = setting("delta", "Differences in full precision, without their zeros.")
    history: int = setting(
        4, "Rounds that a participant may be behind before it gets the full state.", unit="rounds", ge=1
    )


class QuantizedDownload(Table):
    """Differences in integer codes. What all share is what was sent; the coordinator keeps the rest for later."""

    kind: Literal["quantized"] = setting("quantized", "Differences as integer codes; what was sent is the truth.")
    bits: Literal[8, 4] = setting(8, "Bits of a code.", unit="bits")
    block: int = setting(256, "Entries that share a scale.", unit="entries", ge=8, le=1 << 20, multiple_of=4)
    history: int = setting(
        4, "Rounds that a participant may be behind before it gets the full state.", unit="rounds", ge=1
    )


Download = Annotated[FullDownload | DeltaDownload | QuantizedDownload, Field(discriminator="kind")]


class Updates(Table):
    """How updates travel."""

    links: tuple[LinkTable, ...] = setting((), "Stages that every update passes, in this order; none: full precision.")
    download: Download = setting(FullDownload(), "How the shared state reaches participants.")


# --- streaming -----------------------------------------------------------------------------------


class Streaming(Table):
    """Streaming DiLoCo (arXiv 2501.18512): a round exchanges one fragment while local steps go on.

    A fragment comes round every ``fragments x rounds.local_steps`` local steps, the paper's H.
    """

    kind: Literal["streaming"] = setting("streaming", "One fragment a round (Streaming DiLoCo).")
    fragments: int = setting(
        4,
        "Parts of the model (P), exchanged in turn: embeddings and head, and strided layers.",
        unit="fragments",
        ge=1,
        le=1000,
    )
    overlap: int = setting(
        1, "Local steps taken while an exchange travels (tau), fewer than a round has.", unit="local steps", ge=0
    )
    mixing: float = setting(
        0.5,
        "What is kept of a participant's own fragment when the shared one arrives (alpha).",
        unit="fraction",
        ge=0,
        lt=1,
    )


class Eager(Table):
    """Eager updates (arXiv 2502.12996): an exchange travels for a whole round of local steps.

    A participant's own update counts at once, those of the others when they have arrived.
    """

    kind: Literal["eager"] = setting("eager", "A whole round overlaps; one's own update counts at once.")


Overlap = Annotated[Streaming | Eager, Field(discriminator="kind")]


def chain_faults(links: Sequence[LinkTable]) -> Iterator[str]:
    """Sentences that say why links cannot follow each other."""
    for kinds, what in ((ErrorFeedback, "error-feedback"), (SPARSE, "sparsifying links"), (CODES, "codes")):
        if sum(isinstance(link, kinds) for link in links) > 1:
            yield f"updates.links: more than one of {what}"
    for place, link in enumerate(links):
        after = links[place + 1 :]
        if isinstance(link, CODES) and after:
            yield f"updates.links: {link.kind!r} must be the last"
        if isinstance(link, SPARSE) and any(isinstance(other, Clip | ErrorFeedback) for other in after):
            yield f"updates.links: {link.kind!r} must follow clip and error-feedback"
        if isinstance(link, ErrorFeedback):
            if not after:
                yield "updates.links: error-feedback has nothing after it to lose"
            if any(isinstance(other, Clip) for other in after):
                yield "updates.links: clip must precede error-feedback"
            if any(isinstance(other, RandomK) and other.unbiased for other in after):
                yield "updates.links: random-k below error-feedback needs unbiased = false"


def streaming_faults(recipe: Recipe) -> Iterator[str]:
    """Sentences that say why streaming and the rest of a recipe do not go together."""
    streaming = recipe.rounds.streaming
    if streaming is None:
        return
    if isinstance(streaming, Streaming) and streaming.overlap >= recipe.local_steps:
        yield (
            f"rounds.streaming.overlap {streaming.overlap}: must be less than the {recipe.local_steps} local steps "
            "between two exchanges"
        )
    if recipe.fragments > recipe.rounds.count:
        yield f"rounds.streaming.fragments {recipe.fragments}: {recipe.rounds.count} rounds exchange fewer"
    if recipe.asked_per_round < len(recipe.participant_names):
        yield "rounds.streaming: everybody takes part in each round; leave out participants_per_round and fraction"
    if isinstance(streaming, Eager) and recipe.rounds.weights == "data":
        yield "rounds.weights and rounds.streaming: eager takes one's own part at 1 / M, so all must weigh alike"
    if isinstance(streaming, Eager) and recipe.outer.kind not in ("sgd", "nesterov"):
        yield "rounds.streaming: eager goes with outer.kind sgd and nesterov"
    if recipe.local.proximal:
        yield "local.proximal and rounds.streaming: the pull is to the start of a round, of which streaming has none"
    if not recipe.local.keep_optimizer:
        yield "local.keep_optimizer and rounds.streaming: local steps go on over rounds, and so must their state"
