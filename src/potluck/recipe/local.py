"""The part of a recipe that says what a participant does between two rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potluck.recipe.adaptive import AdaptiveBatch
from potluck.recipe.table import Table, setting


class AdamW(Table):
    """AdamW, fused (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = setting("adamw", "AdamW.")
    learning_rate: float = setting(2e-3, "Peak learning rate.", gt=0)
    beta1: float = setting(0.9, "Decay of the first moment.", unit="per step", ge=0, lt=1)
    beta2: float = setting(0.99, "Decay of the second moment.", unit="per step", ge=0, lt=1)
    epsilon: float = setting(1e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = setting(0.1, "Decoupled decay of matrices; vectors are spared.", ge=0)


class Muon(Table):
    """Muon on the weights of linear layers within the stack, AdamW on all else (MuLoCo, arXiv 2505.23725)."""

    kind: Literal["muon"] = setting(
        "muon", "Muon for hidden matrices; AdamW for embeddings of all kinds, head, routers, stacked experts, vectors."
    )
    learning_rate: float = setting(0.02, "Peak learning rate of Muon.", gt=0)
    momentum: float = setting(0.95, "Momentum of Muon.", unit="per step", ge=0, lt=1)
    adamw_learning_rate: float = setting(2e-3, "Peak learning rate of AdamW.", gt=0)
    beta1: float = setting(0.9, "AdamW: decay of the first moment.", unit="per step", ge=0, lt=1)
    beta2: float = setting(0.99, "AdamW: decay of the second moment.", unit="per step", ge=0, lt=1)
    epsilon: float = setting(1e-8, "AdamW: added to the root of the second moment.", gt=0)
    weight_decay: float = setting(0.1, "Decoupled decay of matrices; vectors are spared.", ge=0)


class LocalSgd(Table):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = setting("sgd", "SGD.")
    learning_rate: float = setting(0.1, "Peak learning rate.", gt=0)
    momentum: float = setting(0.0, "Heavy-ball momentum.", unit="per step", ge=0, lt=1)
    weight_decay: float = setting(0.0, "L2 penalty on matrices; vectors are spared.", ge=0)


LocalOptimizer = Annotated[AdamW | Muon | LocalSgd, Field(discriminator="kind")]


class Constant(Table):
    """Warm-up, then constant."""

    kind: Literal["constant"] = setting("constant", "Warm-up, then constant.")
    warmup_steps: int = setting(0, "Linear warm-up.", unit="local steps", ge=0)


class Cosine(Table):
    """Warm-up, then half a cosine over the run's total local steps."""

    kind: Literal["cosine"] = setting("cosine", "Warm-up, then half a cosine.")
    warmup_steps: int = setting(0, "Linear warm-up.", unit="local steps", ge=0)
    final_fraction: float = setting(0.1, "Where it ends.", unit="fraction of the peak", ge=0, le=1)


class WarmupStableDecay(Table):
    """Warm-up, plateau, then `1 - sqrt` decay over the last part of the run (arXiv 2405.18392)."""

    kind: Literal["wsd"] = setting("wsd", "Warm-up, stable, decay.")
    warmup_steps: int = setting(0, "Linear warm-up.", unit="local steps", ge=0)
    decay_fraction: float = setting(0.2, "Length of the decay.", unit="fraction of the run", gt=0, le=1)
    final_fraction: float = setting(0.0, "Where it ends.", unit="fraction of the peak", ge=0, le=1)


Schedule = Annotated[Constant | Cosine | WarmupStableDecay, Field(discriminator="kind")]


class Local(Table):
    """What a participant does between two rounds."""

    batch_size: int = setting(8, "Sequences in one forward pass.", unit="sequences", ge=1)
    sequence_length: int = setting(128, "Tokens in one sequence.", unit="tokens", ge=2)
    accumulation: int = setting(1, "Forward passes whose gradients make one local step.", unit="batches", ge=1)
    clip_norm: float = setting(1.0, "Clip the gradient's norm to this; 0 is off.", ge=0)
    keep_optimizer: bool = setting(
        True, "Keep each participant's optimizer state from round to round (DiLoCo); else reset."
    )
    proximal: float = setting(
        0.0, "FedProx: pull towards the shared state, (rho/2)|theta_i - theta|^2; 0 is off.", ge=0
    )
    max_skipped_steps: int = setting(
        5, "Steps in a row that may be skipped for a non-finite loss or gradient.", unit="local steps", ge=0
    )
    adaptive_batch: AdaptiveBatch | None = setting(
        None, "Let the batch grow from `batch_size` by the norm test (AdLoCo); left out: it stays."
    )
    optimizer: LocalOptimizer = setting(AdamW(), "The inner optimizer.")
    schedule: Schedule = setting(Cosine(), "Learning rate over the run's total local steps.")
