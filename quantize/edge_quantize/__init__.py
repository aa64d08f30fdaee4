"""From a trained network to a checkpoint that devices serve and learn on.

    from edge_quantize import Dataset, build_checkpoint

    result = build_checkpoint(model, data, labels=labels, name="digits", release=1, ...)
    print(result.comparison.table())

Names are resolved when they are first used, so that importing the package loads neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import MissingExtraError

if TYPE_CHECKING:
    from edge_quantize.build import BuildResult, Search, build_checkpoint
    from edge_quantize.calibrate import Calibration
    from edge_quantize.card import CardText
    from edge_quantize.compare import Comparison, compare_variants, encode
    from edge_quantize.data import DataFormat, Dataset
    from edge_quantize.errors import CalibrationWarning, DataError, ExportError, LeakageWarning, ParityError
    from edge_quantize.export import export_onnx
    from edge_quantize.graph import Split, load_onnx, split
    from edge_quantize.learning import Memory
    from edge_quantize.levels import Assessment, assess
    from edge_quantize.pack import pack_checkpoint, pack_whole, repack_checkpoint
    from edge_quantize.quantize import QuantRecipe, Trunks, quantize_trunk, quantize_whole
    from edge_quantize.recipe import Recipe, load_recipe, run_recipe
    from edge_quantize.search import Budget, SearchResult
    from edge_quantize.sensitivity import Sensitivity

_HOME = {
    "Assessment": "levels",
    "Budget": "search",
    "BuildResult": "build",
    "Calibration": "calibrate",
    "CalibrationWarning": "errors",
    "CardText": "card",
    "Comparison": "compare",
    "DataError": "errors",
    "DataFormat": "data",
    "Dataset": "data",
    "ExportError": "errors",
    "LeakageWarning": "errors",
    "Memory": "learning",
    "ParityError": "errors",
    "QuantRecipe": "quantize",
    "Recipe": "recipe",
    "Search": "build",
    "SearchResult": "search",
    "Sensitivity": "sensitivity",
    "Split": "graph",
    "Trunks": "quantize",
    "assess": "levels",
    "build_checkpoint": "build",
    "compare_variants": "compare",
    "encode": "compare",
    "export_onnx": "export",
    "load_onnx": "graph",
    "load_recipe": "recipe",
    "pack_checkpoint": "pack",
    "pack_whole": "pack",
    "quantize_trunk": "quantize",
    "quantize_whole": "quantize",
    "repack_checkpoint": "pack",
    "run_recipe": "recipe",
    "split": "graph",
}

__all__ = [
    "Assessment",
    "Budget",
    "BuildResult",
    "Calibration",
    "CalibrationWarning",
    "CardText",
    "Comparison",
    "DataError",
    "DataFormat",
    "Dataset",
    "ExportError",
    "LeakageWarning",
    "Memory",
    "ParityError",
    "QuantRecipe",
    "Recipe",
    "Search",
    "SearchResult",
    "Sensitivity",
    "Split",
    "Trunks",
    "assess",
    "build_checkpoint",
    "compare_variants",
    "encode",
    "export_onnx",
    "load_onnx",
    "load_recipe",
    "pack_checkpoint",
    "pack_whole",
    "quantize_trunk",
    "quantize_whole",
    "repack_checkpoint",
    "run_recipe",
    "split",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxscript", "torch"):
            raise
        raise MissingExtraError(f"edge_quantize.{name}", "quantize") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
