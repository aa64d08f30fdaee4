"""`edge-coordinator build`: make a new base from a dataset, and hold it against the release in use."""

from __future__ import annotations

from pathlib import Path

import click

from edge_server.cli_common import home_option, json_option, open_registry, print_records, when

_ACTOR = "cli"


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
    from edge_server.build import slices_worst_first

    def tell(step: int, steps: int, what: str) -> None:
        click.echo(f"[{step}/{steps}] {what}", err=True)

    with open_registry(home) as registry:
        made = run(registry, recipe, out=out, group=group, actor=_ACTOR, progress=tell)
        record = made.record
        if as_json:
            print_records(record, (), (), as_json=True)
        else:
            click.echo(made.comparison.table(parts=False))
            rows = [
                (name, count, f"{was:.1%}", f"{now:.1%}")
                for name, count, was, now in slices_worst_first(made.evaluation)
            ]
            if rows:
                print_records((), ("slice", "rows", "in use", "candidate"), rows, as_json=False)
            click.echo(f"release {record.release} in {out}: {record.verdict}; {record.reason}")
        if record.verdict == "lost":
            raise SystemExit(1)
        if push:
            number = registry.push(out, group=group, actor=_ACTOR)
            click.echo(f"rollout {number}: {registry.rollout(number).state.reason}", err=as_json)


@click.command()
@home_option
@json_option
def candidates(home: Path, as_json: bool) -> None:
    """List what was built here, newest first, and how it did against the release in use."""
    with open_registry(home) as registry:
        records = registry.store.candidates.all()
    columns = ("release", "name", "digest", "built (UTC)", "against", "verdict", "why")
    rows = [(r.release, r.name, r.digest[:12], when(r.built), r.champion or "-", r.verdict, r.reason) for r in records]
    print_records(records, columns, rows, as_json=as_json)
