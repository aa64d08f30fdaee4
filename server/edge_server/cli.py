"""`edge-coordinator`: the coordinator's command line.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or settings, 3 a checkpoint that is damaged or does not fit,
4 network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from edge_sdk.errors import ArtifactError, ConfigError, EdgeError, TransportError

if TYPE_CHECKING:
    import msgspec

    from edge_server.registry import Registry

P = ParamSpec("P")
T = TypeVar("T")


class _Group(click.Group):
    """Turns typed errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(_exit_code(error))


def _exit_code(error: EdgeError) -> int:
    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, ArtifactError):
        return 3
    return 4 if isinstance(error, TransportError) else 1


def _home_option(function: Callable[P, T]) -> Callable[P, T]:
    return click.option(
        "--home",
        type=click.Path(file_okay=False, path_type=Path),
        default=Path(),
        envvar="EDGE_COORDINATOR_HOME",
        show_envvar=True,
        help="The coordinator's folder; by default the current one.",
    )(function)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and log more.")
@click.version_option(package_name="edge-sdk", prog_name="edge-coordinator")
def main(debug: bool) -> None:
    """Coordinate a fleet: take in reports, ship releases in stages, halt the bad ones."""
    import logging

    # libraries speak up when something is wrong; the coordinator also says what it does
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


@main.command()
@_home_option
def init(home: Path) -> None:
    """Make the coordinator's folder, with its settings and an empty database."""
    from edge_sdk.files import replace_file, storage_error
    from edge_server.settings import SETTINGS_NAME

    path = home / SETTINGS_NAME
    if path.exists():
        raise ConfigError(f"{path} exists already: edit it, or choose another folder")
    example = resources.files("edge_server").joinpath("coordinator.example.toml").read_bytes()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, f"cannot make {home}") from error
    replace_file(path, example)
    with _registry(home):
        click.echo(f"{path} is ready; start with: edge-coordinator serve --home {home}")


@main.command()
@_home_option
@click.option("--expose-broker", is_flag=True, help="Let the embedded broker listen beyond this machine.")
def serve(home: Path, expose_broker: bool) -> None:
    """Run the coordinator, its API and its dashboard until SIGTERM or SIGINT."""
    import logging
    from contextlib import ExitStack

    from edge_sdk.mqtt import MqttTransport
    from edge_server.broker import EmbeddedBroker
    from edge_server.coordinator import Coordinator
    from edge_server.service import listen, run
    from edge_server.settings import SETTINGS_NAME, is_loopback, load_settings

    logging.getLogger("edge_server").setLevel(logging.INFO)
    settings = load_settings(home / SETTINGS_NAME)
    broker, port = settings.broker, settings.broker.port
    if broker.embedded and not expose_broker and not is_loopback(broker.host):
        raise ConfigError(
            f"broker.host {broker.host!r} can be reached from other machines, and the embedded broker checks no "
            "passwords: use mosquitto, or --expose-broker on a network that you trust"
        )
    with ExitStack() as stack:
        if broker.embedded:
            port = stack.enter_context(EmbeddedBroker(host=broker.host, port=broker.port)).port
        transport = MqttTransport(
            broker.host,
            port,
            client_id=f"coordinator-{settings.prefix}",
            username=broker.username,
            password=_password(home, broker.password_file),
        )
        listener = listen(settings.http)
        stack.callback(listener.close)
        coordinator = Coordinator(home, transport=transport, settings=settings)
        host, http_port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{http_port}/"

        def announce() -> None:
            click.echo(f"dashboard {url}  broker {broker.host}:{port}")

        run(coordinator, listener, on_ready=announce)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_home_option
@click.option("--group", default="default", show_default=True, help="Who gets the release.")
@click.option("--stages", help="Percent of the group in each stage, such as 10,100.")
@click.option("--soak", type=float, metavar="SECONDS", help="Time a stage runs before the next.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Time after which a stage is halted.")
@click.option("--min-labelled", type=int, help="Labelled predictions a stage must gather; 0: health alone.")
@click.option("--max-drop", type=float, help="Loss of accuracy that is tolerated, 0 to 1.")
@click.option("--max-failures", type=int, help="Devices that may fail to install or keep it.")
def push(checkpoint: Path, home: Path, group: str, stages: str | None, **options: float | None) -> None:
    """Take in a CHECKPOINT folder and start its rollout. What is not given comes from the settings."""
    import msgspec

    names = {"soak": "soak_s", "timeout": "timeout_s", "max_drop": "max_accuracy_drop"}
    given: dict[str, Any] = {names.get(name, name): value for name, value in options.items() if value is not None}
    if stages is not None:
        try:
            given["stages"] = tuple(int(part) for part in stages.split(","))
        except ValueError:
            raise click.BadParameter(f"{stages!r} is no list of percentages such as 10,100") from None
    with _registry(home) as registry:
        try:
            rules = msgspec.structs.replace(registry.settings.rollout, **given)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        number = registry.push(checkpoint, group=group, plan=rules, actor="cli")
        record = registry.rollout(number)
    click.echo(f"rollout {number}: release {record.plan.release} to group {group}, {record.state.reason}")


@main.group()
def rollout() -> None:
    """Look at rollouts, or stop one."""


@rollout.command("list")
@_home_option
@_json_option
def rollout_list(home: Path, as_json: bool) -> None:
    """List all rollouts, newest first."""
    with _registry(home) as registry:
        records = registry.rollouts()
    columns = ("id", "release", "group", "status", "stage", "reason")
    rows = [
        (r.id, r.plan.release, r.plan.group, r.state.status, r.plan.stages[r.state.stage], r.state.reason)
        for r in records
    ]
    _print(records, columns, rows, as_json=as_json)


@rollout.command("show")
@click.argument("number", type=int)
@_home_option
@_json_option
def rollout_show(number: int, home: Path, as_json: bool) -> None:
    """Show one rollout with its history."""
    with _registry(home) as registry:
        record = registry.rollout(number)
    rows = [(_when(step.time), step.status, step.stage + 1, step.reason) for step in record.state.history]
    _print(record, ("time (UTC)", "status", "stage", "what"), rows, as_json=as_json)


@rollout.command("abort")
@click.argument("number", type=int)
@_home_option
@click.option("--reason", default="", help="Kept with the rollout.")
def rollout_abort(number: int, home: Path, reason: str) -> None:
    """Withdraw a release; devices that run it go back to what they had."""
    with _registry(home) as registry:
        registry.abort(number, reason=reason, actor="cli")
    click.echo(f"rollout {number} is being rolled back")


@main.group()
def devices() -> None:
    """Add devices, list them, export their passwords' hashes."""


@devices.command("add")
@click.argument("name")
@_home_option
@click.option("--group", default="default", show_default=True, help="Which releases the device gets.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle; by default NAME.bundle.json.")
def devices_add(name: str, home: Path, group: str, out: Path | None) -> None:
    """Register a device and write the bundle that `edge enroll` reads. It holds the device's password."""
    path = out or Path(f"{name}.bundle.json")
    with _registry(home) as registry:
        registry.enrol(name, group=group, out=path, actor="cli")
    click.echo(f"{path} is ready: bring it to the device and run: edge enroll {path.name}")


@devices.command("list")
@_home_option
@_json_option
def devices_list(home: Path, as_json: bool) -> None:
    """List all devices."""
    with _registry(home) as registry:
        records = registry.devices()
    columns = ("device", "group", "health", "release", "head", "accuracy", "alarms", "last seen (UTC)")
    rows = [
        (
            *(r.name, r.group, r.health, _dash(r.release), _dash(r.head)),
            *("-" if r.accuracy is None else f"{r.accuracy:.1%}", r.alarms, _when(r.last_seen)),
        )
        for r in records
    ]
    _print(records, columns, rows, as_json=as_json)


@devices.command("passwd")
@_home_option
def devices_passwd(home: Path) -> None:
    """Print a mosquitto password file with every enrolled device."""
    with _registry(home) as registry:
        click.echo(registry.password_file(), nl=False)


@contextmanager
def _registry(home: Path) -> Iterator[Registry]:
    from edge_server.registry import Registry
    from edge_server.settings import SETTINGS_NAME, load_settings

    registry = Registry(home, settings=load_settings(home / SETTINGS_NAME))
    try:
        yield registry
    finally:
        registry.close()


def _password(home: Path, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return (home / name).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"broker.password_file {name!r} cannot be read: {error}") from error


def _print(
    records: msgspec.Struct | Sequence[msgspec.Struct],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    as_json: bool,
) -> None:
    """Print records as JSON, or as a table with a width for each column."""
    if as_json:
        import msgspec

        from edge_server import records as forms

        plain = forms.as_json(records) if isinstance(records, msgspec.Struct) else [forms.as_json(r) for r in records]
        click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2))
        return
    table = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _dash(value: object) -> str:
    return "-" if value is None else str(value)


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
