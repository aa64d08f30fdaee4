"""A build written down: one TOML file from which the same checkpoint can be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_quantize.build import BuildResult, Search, build_checkpoint
from edge_quantize.card import CardText
from edge_quantize.data import DataFormat, Dataset
from edge_quantize.export import Exporter, load_model
from edge_quantize.learning import Memory
from edge_quantize.quantize import QuantRecipe
from edge_quantize.search import Progress
from edge_sdk.errors import ConfigError
from edge_sdk.manifest import StateSpec, TargetSpec
from edge_sdk.schema import InputSpec
from edge_sdk.types import Task


class ModelRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the network comes from: code that makes it, or an ONNX file."""

    call: str | None = None
    """"module:callable", a file beside the recipe or an installed module."""
    state: str | None = None
    """State dict to load into it."""
    onnx: str | None = None
    """An ONNX file instead."""
    exporter: Exporter = "dynamo"
    """Of torch; "classic" for what the present one refuses."""

    def __post_init__(self) -> None:
        """Check that there is one source.

        Raises:
            ValueError: There are two, or none.
        """
        if (self.call is None) == (self.onnx is None):
            raise ValueError("model needs either `call` or `onnx`")
        if self.state is not None and self.call is None:
            raise ValueError("model.state goes with `call`; an ONNX file holds its weights")


class DataRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files of rows: .npz with `x` and `y`, .npy pairs, .csv or .parquet; calibration needs x alone.

    Rows of several inputs are an .npz with `x.NAME` for each.
    """

    holdout: str
    train: str | None = None
    """Not needed with adapt = "none"."""
    calibration: str | None = None
    validation: str | None = None
    """What a search chooses by."""
    target: list[str] = []
    """Columns of a table with the truth."""
    slices: list[str] = []
    """Columns of the held-out table whose values part its rows for the figures."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `build_checkpoint` is told. File names are relative to the recipe's folder."""

    name: str
    release: int
    output: str
    """The checkpoint folder to make."""
    labels: list[str] = []
    """One for each output: labels, or names of a regression's targets."""
    task: Task = "classification"
    adapt: Literal["auto", "head", "none"] = "auto"
    model: ModelRecipe
    data: DataRecipe
    input: InputSpec
    more_inputs: list[InputSpec] = []
    state: list[StateSpec] = []
    fixed: dict[str, float | int | list[float]] = {}
    """Inputs that never change, with their value."""
    targets: list[TargetSpec] = []
    thresholds: list[float] = []
    created: str | None = None
    """ISO 8601; None takes the time of the run, which then differs in every run."""
    parent: str | None = None
    """Checkpoint folder that this release replaces."""
    cut: str | None = None
    seed: int = 0
    quantization: QuantRecipe = QuantRecipe()
    search: Search = Search()
    """For `edge-quantize auto`, which looks for a recipe instead."""
    memory: Memory = Memory()
    random_features: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Width of a layer of random features to put before the head; 0: none."""
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


def run_recipe(path: Path, *, created: str, searching: bool = False, progress: Progress | None = None) -> BuildResult:
    """Build what a recipe describes.

    Args:
        path: The recipe.
        created: Used if the recipe does not state it.
        searching: Look for the quantization, as `search` says, instead of taking the one stated.
        progress: Told the steps of a search.

    Raises:
        EdgeError: As in `load_recipe` and `build_checkpoint`.
    """
    recipe = load_recipe(path)
    folder = path.resolve().parent
    source, data = recipe.model, recipe.data
    if source.onnx is not None:
        model: Any = folder / source.onnx
        if not model.is_file():
            raise ConfigError(f"model.onnx: {model} does not exist")
    else:
        assert source.call is not None  # one of the two is there
        model = load_model(source.call, folder=folder, state=_inside(folder, source.state))
    return build_checkpoint(
        model,
        Dataset.load(
            _inside(folder, data.train),
            folder / data.holdout,
            _inside(folder, data.calibration),
            validation=_inside(folder, data.validation),
            spec=recipe.input,
            labels=recipe.labels,
            task=recipe.task,
            form=DataFormat(target=data.target, slices=data.slices),
        ),
        labels=recipe.labels,
        name=recipe.name,
        release=recipe.release,
        target=folder / recipe.output,
        created=recipe.created or created,
        input_spec=recipe.input,
        task=recipe.task,
        adapt=recipe.adapt,
        targets=recipe.targets,
        thresholds=recipe.thresholds,
        more_inputs=recipe.more_inputs,
        state=recipe.state,
        fixed=recipe.fixed,
        parent=_inside(folder, recipe.parent),
        cut=recipe.cut,
        exporter=source.exporter,
        seed=recipe.seed,
        quantization=recipe.search if searching else recipe.quantization,
        memory=recipe.memory,
        random_features=recipe.random_features,
        card=recipe.card,
        progress=progress,
    )


def _inside(folder: Path, name: str | None) -> Path | None:
    return None if name is None else folder / name
