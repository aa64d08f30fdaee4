"""`edge-coordinator build`: make a new base from a dataset, and hold it against the release in use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when

if TYPE_CHECKING:
    from edge_server.records import CandidateRecord

_ACTOR = "cli"
_SLICES = ("slice", "rows", "in use", "candidate", "harmed")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@home_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The checkpoint folder to make.")
@click.option("--group", default="default", show_default=True, help="Whose release in use it is compared with.")
@click.option("--push", is_flag=True, help="Start its rollout if it did not lose, with the plan of the settings.")
@json_option
def build(recipe: Path, home: Path, out: Path, group: str, push: bool, as_json: bool) -> None:
    """Make the candidate that RECIPE (TOML) describes: train, quantize, compare, write the card. See docs/rollouts.md.

    Exit code 1: it lost against the release in use.
    """
    import edge_quantize

    _ = edge_quantize.build_checkpoint  # says which extra is missing
    from edge_server.build import build as run

    def tell(step: int, steps: int, what: str) -> None:
        click.echo(f"[{step}/{steps}] {what}", err=True)

    with open_registry(home) as registry:
        made = run(registry, recipe, out=out, group=group, actor=_ACTOR, progress=tell)
        record = made.record
        if as_json:
            print_records(record, (), (), as_json=True)
        else:
            click.echo(made.comparison.table(parts=False))
            if record.slices:
                print_records((), _SLICES, _slices(record), as_json=False)
            click.echo(f"release {record.release} in {out}: {record.verdict}; {record.reason}")
        if record.verdict == "lost":
            raise SystemExit(1)
        if push:
            number = registry.push(out, group=group, actor=_ACTOR)
            click.echo(f"rollout {number}: {registry.rollout(number).state.reason}", err=as_json)


@click.group()
def candidates() -> None:
    """Look at what was built here, and how it did against the release in use."""


@candidates.command("list")
@home_option
@json_option
def candidates_list(home: Path, as_json: bool) -> None:
    """List all candidates, newest first."""
    with open_registry(home) as registry:
        records = registry.store.candidates.page(limit=1000)
    columns = ("release", "name", "digest", "built (UTC)", "against", "verdict", "why")
    rows = [(r.release, r.name, r.digest[:12], when(r.built), r.champion or "-", r.verdict, r.reason) for r in records]
    print_records(records, columns, rows, as_json=as_json)


@candidates.command("show")
@click.argument("digest")
@home_option
@json_option
def candidates_show(digest: str, home: Path, as_json: bool) -> None:
    """Show how the candidate of DIGEST (as much of it as `list` shows) did by slice, its lineage and its card."""
    from edge_server.api import candidate_view

    with open_registry(home) as registry:
        known = [record.digest for record in registry.store.candidates.page(limit=1000)]
        found = candidate_view(registry, next((each for each in known if digest and each.startswith(digest)), digest))
    print_records(found, _SLICES, _slices(found), as_json=as_json)
    if as_json:
        return
    click.echo(f"\n{found.verdict}; {found.reason}")
    for what, value in found.report.get("lineage", {}).items():
        click.echo(f"{what.replace('_', ' ')}: {value}")
    click.echo(f"\n{found.card}", nl=False)


def _slices(record: CandidateRecord) -> list[tuple[Any, ...]]:
    return [
        (
            part["name"],
            part["rows"],
            f"{part['champion']:.1%}",
            f"{part['challenger']:.1%}",
            "yes" if part["harmed"] else "-",
        )
        for part in record.slices
    ]
