"""Where the recipes that come with the package lie, and which one a run starts from."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by the name of one that comes with the package.

    Raises:
        ValueError: neither a file nor the name of a packaged recipe.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    packaged = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise ValueError(f"recipe: expected a YAML file or one of {packaged}, got {name!r}")


def default_recipe(method: str, data: str) -> Path | None:
    """The packaged recipe for this method on this data, ``METHOD_DATA.yaml`` or else ``DATA.yaml``, if there is one."""
    paths = (RECIPES / f"{name}.yaml" for name in (f"{method}_{data}", data))
    return next((path for path in paths if path.is_file()), None)
