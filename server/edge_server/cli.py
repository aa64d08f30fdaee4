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
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

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
    with _registry(home) as registry:
        tls = registry.identities.tls()
    with ExitStack() as stack:
        if broker.embedded:
            port = stack.enter_context(EmbeddedBroker(host=broker.host, port=broker.port)).port
        transport = MqttTransport(
            broker.host,
            port,
            client_id=f"coordinator-{settings.prefix}",
            username=broker.username,
            password=_password(home, broker.password_file),
            tls=tls,
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
        record, signed = registry.rollout(number), registry.repository.exists
    if not signed:
        click.echo("NOT signed: there are no keys; make them with: edge-coordinator keys init", err=True)
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
    """Add devices, list them, replace or revoke them."""


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


@devices.command("replace")
@click.argument("name")
@_home_option
@click.option("--out", type=click.Path(path_type=Path), help="The bundle; by default NAME.bundle.json.")
def devices_replace(name: str, home: Path, out: Path | None) -> None:
    """Write a new bundle for a device; what the one before it holds is void. Then renew the broker's files."""
    path = out or Path(f"{name}.bundle.json")
    with _registry(home) as registry:
        registry.replace(name, out=path, actor="cli")
    click.echo(f"{path} is ready: bring it to the device and run: edge enroll --force {path.name}")
    click.echo("now renew the broker's files (edge-coordinator broker-files) and let it reload them")


@devices.command("revoke")
@click.argument("name")
@_home_option
def devices_revoke(name: str, home: Path) -> None:
    """Turn a device away. Its messages are dropped at once; the broker has to be given its new files."""
    with _registry(home) as registry:
        registry.identities.revoke(name, actor="cli")
    click.echo(
        f"{name} is revoked; now renew the broker's files (edge-coordinator broker-files) and let it reload them"
    )


@devices.command("passwd")
@_home_option
def devices_passwd(home: Path) -> None:
    """Print a mosquitto password file with every enrolled device."""
    with _registry(home) as registry:
        click.echo(registry.password_file(), nl=False)


@main.group()
def releases() -> None:
    """Look at releases as a device would, or copy them for a web server."""


@releases.command("list")
@_home_option
@_json_option
def releases_list(home: Path, as_json: bool) -> None:
    """List all releases, newest first, and whether they are signed."""
    from edge_server.verify import list_releases

    with _registry(home) as registry:
        records = list_releases(registry)
    rows = [(r.release, r.name, r.digest[:12], "yes" if r.signed else "no", _when(r.pushed)) for r in records]
    _print(records, ("release", "name", "digest", "signed", "pushed (UTC)"), rows, as_json=as_json)


@releases.command("verify")
@_home_option
@_json_option
def releases_verify(home: Path, as_json: bool) -> None:
    """Check signatures, dates and every file of the signed releases, from the first root on, as a device does."""
    from edge_sdk.errors import IntegrityError
    from edge_server.verify import verify_releases

    with _registry(home) as registry:
        records = verify_releases(registry)
    rows = [(r.release, r.digest[:12], r.problem or "good") for r in records]
    _print(records, ("release", "digest", "a device would find it"), rows, as_json=as_json)
    if bad := [r.release for r in records if r.signed and r.problem]:
        raise IntegrityError(f"{len(bad)} signed releases would be refused: {', '.join(map(str, bad))}")


@releases.command("export")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@_home_option
def releases_export(folder: Path, home: Path) -> None:
    """Copy signed metadata and files to FOLDER, for a web server (update.url of devices)."""
    from edge_server.verify import export

    with _registry(home) as registry:
        copied = export(registry, folder)
    click.echo(f"{copied} files copied to {folder}")


def _root_keys_option(function: Callable[P, T]) -> Callable[P, T]:
    for option in (
        click.option("--no-passphrase", is_flag=True, help="The root keys are not encrypted."),
        click.option("--passphrase", envvar="EDGE_ROOT_PASSPHRASE", show_envvar=True, help="Asked for if not given."),
        click.option(
            "--root-keys",
            "away",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            multiple=True,
            required=True,
            help="Folder with root keys; once for each, until there are enough.",
        ),
    ):
        function = option(function)
    return function


_new_root_keys_option = click.option(
    "--new-root-keys", "new", type=click.Path(path_type=Path), help="Folder for new root keys, to be taken away."
)


def _passphrase(given: str | None, none: bool, *, new: bool) -> bytes | None:
    if none:
        return None
    text = given or click.prompt("Passphrase of the root keys", hide_input=True, confirmation_prompt=new, err=True)
    return str(text).encode()


@main.group()
def keys() -> None:
    """Make the keys that devices trust, change and revoke them. From then on every release is signed."""


@keys.command("init")
@_home_option
@click.option("--root-keys", "away", type=click.Path(path_type=Path), required=True, help="New folder; take it away.")
@click.option("--count", default=3, show_default=True, help="Root keys.")
@click.option("--threshold", default=2, show_default=True, help="Root keys that must sign together.")
@click.option("--passphrase", envvar="EDGE_ROOT_PASSPHRASE", show_envvar=True, help="Asked for if not given.")
@click.option("--no-passphrase", is_flag=True, help="Do not encrypt the root keys.")
def keys_init(home: Path, away: Path, count: int, threshold: int, passphrase: str | None, no_passphrase: bool) -> None:
    """Make root keys in a folder to be taken away, and the others here; sign the releases there are."""
    secret = _passphrase(passphrase, no_passphrase, new=True)
    with _registry(home) as registry:
        registry.repository.init(away, count=count, threshold=threshold, passphrase=secret)
        signed = registry.sign_all()
    click.echo(
        f"{count} root keys are in {away}: take them away, to {count} places; any {threshold} of them sign together"
    )
    click.echo(f"{signed} releases signed. Devices that are added from now on get the root in their bundle")


@keys.command("list")
@_home_option
@_json_option
def keys_list(home: Path, as_json: bool) -> None:
    """List the keys that the newest root names."""
    with _registry(home) as registry:
        records = registry.repository.keys()
    rows = [(r.role, r.key[:16], r.threshold, r.expires, "here" if r.here else "away") for r in records]
    _print(records, ("role", "key", "must sign", "good until (UTC)", "secret"), rows, as_json=as_json)


@keys.command("rotate")
@click.argument("role", type=click.Choice(["root", "targets", "snapshot", "timestamp"]))
@_home_option
@_root_keys_option
@_new_root_keys_option
def keys_rotate(
    role: Literal["root", "targets", "snapshot", "timestamp"],
    home: Path,
    away: tuple[Path, ...],
    passphrase: str | None,
    no_passphrase: bool,
    new: Path | None,
) -> None:
    """Replace the keys of ROLE by new ones."""
    secret = _passphrase(passphrase, no_passphrase, new=new is not None)
    with _registry(home) as registry:
        version = registry.repository.rotate(role, away, passphrase=secret, new=new)
    click.echo(f"root {version}: role {role} has new keys" + (f", in {new}: take them away" if role == "root" else ""))


@keys.command("revoke")
@click.argument("key")
@_home_option
@_root_keys_option
@_new_root_keys_option
def keys_revoke(
    key: str, home: Path, away: tuple[Path, ...], passphrase: str | None, no_passphrase: bool, new: Path | None
) -> None:
    """Take KEY, lost or known to others, out of the root, and put a new one in its place. `keys list` shows it."""
    secret = _passphrase(passphrase, no_passphrase, new=new is not None)
    with _registry(home) as registry:
        version = registry.repository.revoke(key, away, passphrase=secret, new=new)
    click.echo(f"root {version}: {key} is revoked; devices refuse what it signed once they have this root")


@keys.command("renew")
@_home_option
@_root_keys_option
def keys_renew(home: Path, away: tuple[Path, ...], passphrase: str | None, no_passphrase: bool) -> None:
    """Sign the root anew with the same keys, before it expires."""
    secret = _passphrase(passphrase, no_passphrase, new=False)
    with _registry(home) as registry:
        version = registry.repository.renew_root(away, passphrase=secret)
    click.echo(f"root {version} is signed")


@main.command("broker-files")
@_home_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the files.")
@click.option("--host", "hosts", multiple=True, help="Name or address of the broker: gives it a new certificate.")
@click.option("--days", type=click.FloatRange(1, 3650), default=365.0, show_default=True, help="Of that certificate.")
def broker_files(home: Path, out: Path, hosts: tuple[str, ...], days: float) -> None:
    """Write what mosquitto reads: access rules, passwords, certificates and revocations. See docs/brokers.md."""
    with _registry(home) as registry:
        names = registry.identities.broker_files(out, hosts=hosts, days=days)
    click.echo(f"{', '.join(names)} written to {out}; let the broker reload them (SIGHUP)")


@main.command("command")
@click.argument("device")
@click.argument("order")
@click.argument("args", nargs=-1, metavar="[KEY=VALUE]...")
@_home_option
@click.option("--expires", type=click.FloatRange(1), default=86_400.0, show_default=True, metavar="SECONDS",
              help="After this time it is not carried out any more.")  # fmt: skip
def command(device: str, order: str, args: tuple[str, ...], home: Path, expires: float) -> None:
    """Tell DEVICE what to do.

    ORDER: adapt-now, roll-back, reset-to-base, pause-learning [seconds=S], resume-learning, report-interval seconds=S
    (0: as configured), mode mode=monitor|shadow|adapt, status, diagnostics. The answer comes with `commands`.
    """
    pairs = [text.partition("=") for text in args]
    if wrong := [text for text, (_, equals, _) in zip(args, pairs, strict=True) if not equals]:
        raise click.BadParameter(f"{wrong[0]!r} is no KEY=VALUE")
    given = {key: value for key, _, value in pairs}
    with _registry(home) as registry:
        record = registry.identities.order(device, order, given, expires_s=expires, actor="cli")
    click.echo(f"command {record.id} waits for {device}; its answer: edge-coordinator commands {device}")


@main.command("commands")
@click.argument("device", required=False)
@_home_option
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The newest so many.")
@_json_option
def commands(device: str | None, home: Path, limit: int, as_json: bool) -> None:
    """List commands and their answers, newest first."""
    with _registry(home) as registry:
        records = registry.store.commands(device=device, limit=limit)
    columns = ("command", "device", "order", "given (UTC)", "outcome", "answer")
    rows = [(r.id, r.device, r.name, _when(r.issued), r.outcome, r.reason or r.result) for r in records]
    _print(records, columns, rows, as_json=as_json)


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
