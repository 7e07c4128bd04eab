"""The typed recipe of one run and how it is read from a TOML file."""

from potluck.recipe.load import load_recipe, parse_recipe, recipe_hash, recipe_toml
from potluck.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe", "recipe_hash", "recipe_toml"]
