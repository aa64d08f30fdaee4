"""A build written down: one TOML file from which the same checkpoint can be made again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_quantize.build import BuildResult, build_checkpoint
from edge_quantize.calibrate import Calibration
from edge_quantize.card import CardText
from edge_quantize.data import Dataset
from edge_quantize.export import load_model
from edge_quantize.pack import Memory
from edge_sdk.errors import ConfigError
from edge_sdk.schema import InputSpec


class ModelRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the network comes from."""

    call: str
    """"module:callable", a file beside the recipe or an installed module."""
    state: str | None = None
    """State dict to load into it."""


class DataRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """.npz files with the arrays `x` and `y`; calibration needs `x` alone."""

    train: str
    holdout: str
    calibration: str | None = None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `build_checkpoint` is told. File names are relative to the recipe's folder."""

    name: str
    release: int
    output: str
    """The checkpoint folder to make."""
    labels: list[str]
    model: ModelRecipe
    data: DataRecipe
    input: InputSpec
    created: str | None = None
    """ISO 8601; None takes the time of the run, which then differs in every run."""
    parent: str | None = None
    """Checkpoint folder that this release replaces."""
    cut: str | None = None
    seed: int = 0
    calibration: Calibration = Calibration()
    memory: Memory = Memory()
    card: CardText = CardText()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: The file is missing or no TOML, or a key is unknown, missing or out of range.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def run_recipe(path: Path, *, created: str) -> BuildResult:
    """Build what a recipe describes.

    Args:
        path: The recipe.
        created: Used if the recipe does not state it.

    Raises:
        EdgeError: As in `load_recipe` and `build_checkpoint`.
    """
    recipe = load_recipe(path)
    folder = path.resolve().parent
    return build_checkpoint(
        load_model(recipe.model.call, folder=folder, state=_inside(folder, recipe.model.state)),
        Dataset.load(
            folder / recipe.data.train, folder / recipe.data.holdout, _inside(folder, recipe.data.calibration)
        ),
        labels=recipe.labels,
        name=recipe.name,
        release=recipe.release,
        target=folder / recipe.output,
        created=recipe.created or created,
        input_spec=recipe.input,
        parent=_inside(folder, recipe.parent),
        cut=recipe.cut,
        seed=recipe.seed,
        calibration=recipe.calibration,
        memory=recipe.memory,
        card=recipe.card,
    )


def _inside(folder: Path, name: str | None) -> Path | None:
    return None if name is None else folder / name
