"""`edge-quantize`: make a checkpoint, look into it, check it.

Exit codes: 0 ok, 1 a check failed, 2 usage or settings, 3 a file is damaged.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from edge_quantize.errors import CalibrationWarning
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


@click.group(cls=_Cli)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__)
def main(debug: bool) -> None:
    """Quantize a network and pack it as a checkpoint for devices."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
def run(recipe: Path) -> None:
    """Build the checkpoint that RECIPE (TOML) describes."""
    import warnings

    import edge_quantize

    with warnings.catch_warnings(record=True, action="always", category=CalibrationWarning) as caught:
        result = edge_quantize.run_recipe(recipe, created=_now())
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    click.echo(result.comparison.table())
    click.echo(f"packed {result.manifest.name} release {result.manifest.release}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Print what the manifest of checkpoint FOLDER states; hashes are not checked."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise IntegrityError(f"{folder} has no {MANIFEST_NAME}; is it a checkpoint folder?")
    data = path.read_bytes()
    facts = _facts(parse_manifest(data), digest_of(data))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        for i, line in enumerate(_lines(value)):
            click.echo(f"{'' if i else key:{width}}  {line}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every hash of checkpoint FOLDER, then replay its self-test with both trunks."""
    from edge_sdk.runtime import OnnxRuntime, Variant, self_test

    manifest = verify_checkpoint(folder)
    variants: tuple[Variant, Variant] = ("int8", "fp32")
    for variant in variants:
        self_test(folder, manifest, OnnxRuntime(folder, variant=variant), variant=variant)
    click.echo(f"ok: {manifest.name} release {manifest.release}, {len(manifest.files)} files, self-test passed")


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
        "labels": manifest.labels,
        "input": msgspec.to_builtins(manifest.input),
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
    if isinstance(value, list):
        return [", ".join(map(str, value))]
    return ["-" if value is None else str(value)]
