"""`edge-quantize`: make a checkpoint, look into it, check it.

Exit codes: 0 ok, 1 a check failed, 2 usage or settings, 3 a file is damaged.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from edge_quantize.errors import CalibrationWarning, LeakageWarning
from edge_sdk import __version__
from edge_sdk.clock import SystemClock
from edge_sdk.errors import ConfigError, EdgeError, IntegrityError
from edge_sdk.manifest import MANIFEST_NAME, Manifest, digest_of, parse_manifest, verify_checkpoint

_FAILED, _USAGE, _INTEGRITY = 1, 2, 3


class _Cli(click.Group):
    """Turns the SDK's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeError as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(_exit_code(error))
        except OSError as error:  # a folder of somebody else's, a full disk: what to do is in its own words
            if ctx.params["debug"]:
                raise
            click.echo(f"Error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
            ctx.exit(_FAILED)


@click.group(cls=_Cli)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
def main(debug: bool) -> None:
    """Quantize a network and pack it as a checkpoint for devices."""


_html = click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page for a browser.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_html
def run(recipe: Path, html: Path | None) -> None:
    """Build the checkpoint that RECIPE (TOML) describes."""
    _build(recipe, html, searching=False)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_html
def auto(recipe: Path, html: Path | None) -> None:
    """Try quantization recipes for the network of RECIPE (TOML), and build the checkpoint with the best.

    The fastest that keeps the accuracy within search.max_loss of float wins; if none does or none is faster, the
    one that loses least is packed, and devices that time both serve float.
    """
    _build(recipe, html, searching=True)


def _build(recipe: Path, html: Path | None, *, searching: bool) -> None:
    import warnings

    import edge_quantize

    with warnings.catch_warnings(record=True) as caught:
        for category in (CalibrationWarning, LeakageWarning):
            warnings.simplefilter("always", category)
        result = edge_quantize.run_recipe(
            recipe, created=_now(), searching=searching, progress=_tell if searching else None
        )
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    for line in result.assessment.lines()[:1]:
        click.echo(line)
    if result.search is not None:
        click.echo(result.search.table())
        if result.search.sensitivity is not None:
            click.echo(result.search.sensitivity.table())
    click.echo(result.comparison.table())
    if html is not None:
        sensitivity = None if result.search is None else result.search.sensitivity
        _write(html, result.comparison.to_html(sensitivity=sensitivity))
    click.echo(f"packed {result.manifest.name} release {result.manifest.release}, adapt={result.manifest.adapt}")


def _tell(done: int, total: int, what: str) -> None:
    click.echo(f"[{done}/{total}] {what}", err=True)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json
def inspect(path: Path, as_json: bool) -> None:
    """Say what the checkpoint folder PATH states (hashes are not checked), or what can be done with an ONNX file."""
    if path.suffix == ".onnx":
        _inspect_onnx(path, as_json=as_json)
        return
    _check_folder(path)
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise IntegrityError(f"{path} has no {MANIFEST_NAME}; is it a checkpoint folder?")
    data = manifest_path.read_bytes()
    facts = _facts(parse_manifest(data), digest_of(data))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        for i, line in enumerate(_lines(value)):
            click.echo(f"{'' if i else key:{width}}  {line}")


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"{path} {'is neither a folder nor an ONNX file' if path.exists() else 'does not exist'}")


def _inspect_onnx(path: Path, *, as_json: bool) -> None:
    from edge_quantize.graph import load_onnx
    from edge_quantize.levels import assess

    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    assessment = assess(load_onnx(path))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(assessment), indent=2))
    else:
        click.echo("\n".join(assessment.lines()))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every hash of checkpoint FOLDER, then what learning starts from, then the self-test with each variant."""
    from edge_quantize.learning import check_learning
    from edge_sdk.selftest import self_test

    _check_folder(folder)
    manifest = verify_checkpoint(folder)
    learns = f", learns from {check_learning(folder, manifest)}" if manifest.learns else ""
    for variant in manifest.model_files:
        self_test(folder, manifest, variant=variant)
    click.echo(f"ok: {manifest.name} release {manifest.release}, {len(manifest.files)} files, self-test passed{learns}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Rows nobody trained on, with the truth.")
@click.option("--target", multiple=True, help="Column of a table with the truth; may be repeated.")
@click.option("--slice", "slices", multiple=True, help="Column whose values part the rows; may be repeated.")
@click.option("--repeats", default=200, show_default=True, type=click.IntRange(10), help="Calls timed.")
@_html
@_json
def compare(
    folder: Path, data: Path, target: tuple[str, ...], slices: tuple[str, ...], repeats: int, html: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure INT8 against float in checkpoint FOLDER: accuracy, agreement, speed, size, memory."""
    from edge_quantize.compare import compare_variants
    from edge_quantize.data import DataFormat, Dataset

    _check_folder(folder)
    manifest = verify_checkpoint(folder)
    form = DataFormat(target=list(target), slices=list(slices))
    rows = Dataset.load(None, data, spec=manifest.input, labels=manifest.labels, task=manifest.task, form=form)
    found = compare_variants(folder, rows.holdout_x, rows.holdout_y, slices=rows.slices, repeats=repeats)
    if html is not None:
        _write(html, found.to_html())
    click.echo(found.to_json().decode() if as_json else found.table())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def _exit_code(error: EdgeError) -> int:
    if isinstance(error, IntegrityError):
        return _INTEGRITY
    # errors that are also ValueErrors are about what the caller gave
    return _USAGE if isinstance(error, ConfigError | ValueError) else _FAILED


def _now() -> str:
    return datetime.fromtimestamp(SystemClock().now(), UTC).isoformat(timespec="seconds")


def _facts(manifest: Manifest, digest: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": manifest.name,
        "release": manifest.release,
        "digest": digest,
        "parent": manifest.parent,
        "created": manifest.created,
        "task": manifest.task,
        "adapt": manifest.adapt,
        "serve": manifest.serve,
        "labels": manifest.labels,
        "input": msgspec.to_builtins(manifest.input),
        "more_inputs": msgspec.to_builtins(manifest.more_inputs),
        "state": msgspec.to_builtins(manifest.state),
        "targets": msgspec.to_builtins(manifest.targets),
        "thresholds": manifest.thresholds,
        "trunk_id": manifest.trunk_id,
        "latent": msgspec.to_builtins(manifest.latent),
        "head": msgspec.to_builtins(manifest.head),
        "metrics": manifest.metrics,
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "toolchain": manifest.toolchain,
    }
    return facts


def _lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {item}" for key, item in value.items()] or ["-"]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [", ".join(f"{key} {item}" for key, item in entry.items()) for entry in value]
    if isinstance(value, list):
        return [", ".join(map(str, value)) or "-"]
    return ["-" if value is None else str(value)]
