"""Our own kinds of model, made known to `transformers` when they are needed."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM


def register(model_type: object = None) -> None:
    """Let ``AutoModelForCausalLM`` know our classes: one by its ``model_type``, or all of them.

    Kinds that are not ours are left alone.
    """
    if model_type in (None, "potluck_fused"):
        from potluck.models.fused import FusedConfig, FusedForCausalLM

        AutoConfig.register("potluck_fused", FusedConfig, exist_ok=True)
        AutoModelForCausalLM.register(FusedConfig, FusedForCausalLM, exist_ok=True)
    if model_type in (None, "potluck_mixture"):
        from potluck.models.mixture import MixtureConfig, MixtureForCausalLM

        AutoConfig.register("potluck_mixture", MixtureConfig, exist_ok=True)
        AutoModelForCausalLM.register(MixtureConfig, MixtureForCausalLM, exist_ok=True)
    if model_type in (None, "potluck_edited"):
        from potluck.models.memory import EditedConfig, EditedForCausalLM

        AutoConfig.register("potluck_edited", EditedConfig, exist_ok=True)
        AutoModelForCausalLM.register(EditedConfig, EditedForCausalLM, exist_ok=True)
