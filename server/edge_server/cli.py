"""`edge-coordinator`: the coordinator's command line.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage or settings, 3 a checkpoint that is damaged or does not fit,
4 network.
"""

from __future__ import annotations

import errno
from importlib import resources
from pathlib import Path
from typing import Any

import click

from edge_sdk.errors import ArtifactError, ConfigError, EdgeError, TransportError
from edge_server.cli_access import users
from edge_server.cli_alerts import alerts
from edge_server.cli_build import build, candidates
from edge_server.cli_commands import command, commands
from edge_server.cli_common import home_option, json_option, open_registry, tell
from edge_server.cli_data import audit, backup, export, restore, upgrade
from edge_server.cli_devices import broker_files, devices
from edge_server.cli_fleet import fleet
from edge_server.cli_groups import group
from edge_server.cli_keys import keys
from edge_server.cli_releases import releases
from edge_server.cli_rollouts import push, rollout
from edge_server.cli_segments import segments


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
        except OSError as error:  # a file of the folder that somebody else owns, say
            if ctx.params.get("debug") or error.errno == errno.EPIPE:  # who reads has gone: click ends quietly
                raise
            click.echo(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", err=True)
            ctx.exit(1)


def _exit_code(error: EdgeError) -> int:
    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, ArtifactError):
        return 3
    return 4 if isinstance(error, TransportError) else 1


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and log more.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              envvar="EDGE_COORDINATOR_LOG_FORMAT", show_envvar=True, help="Of the log on stderr.")  # fmt: skip
@click.version_option(package_name="edge-sdk", prog_name="edge-coordinator")
def main(debug: bool, log_format: str) -> None:
    """Coordinate a fleet: take in reports, ship releases in stages, halt the bad ones."""
    import logging

    # libraries speak up when something is wrong; the coordinator also says what it does
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if log_format == "json":
        from edge_server.logs import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


@main.command()
@home_option
@click.option("--user", default="owner", show_default=True, help="Name of the first user, a releaser.")
@json_option
def init(home: Path, user: str, as_json: bool) -> None:
    """Make the coordinator's folder: settings, an empty database, and a first user, whose token is shown this once.

    Settings that are there already, without a database, stay as they are.
    """
    from edge_sdk.files import replace_file, storage_error
    from edge_server.settings import SETTINGS_NAME, load_settings

    path = home / SETTINGS_NAME
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)  # of passwords and tokens the database has the hashes
        is_new = not path.exists()
    except OSError as error:
        raise storage_error(error, f"cannot make {home}") from error
    if is_new:
        replace_file(path, resources.files("edge_server").joinpath("coordinator.example.toml").read_bytes())
    elif (home / load_settings(path).database).exists():
        raise ConfigError(f"{path} exists already: edit it, or choose another folder")
    with open_registry(home, new=True) as registry:
        token = registry.users.add(user, "releaser", actor="cli")
    text = (
        f"{path} is ready; start with: edge-coordinator serve --home {home}\n"
        f"token of {user} (releaser), for the dashboard and the API, kept nowhere else: {token}\n"
        f"sign releases before the first device joins: edge-coordinator keys init --home {home} --root-keys FOLDER"
    )
    tell(text, as_json=as_json, settings=path, user=user, token=token)


@main.command()
@home_option
@click.option("--expose-broker", is_flag=True, help="Let the embedded broker listen beyond this machine.")
@json_option
def serve(home: Path, expose_broker: bool, as_json: bool) -> None:
    """Run the coordinator, its API and its dashboard until SIGTERM or SIGINT."""
    import logging
    from contextlib import ExitStack

    from edge_sdk.files import lock_folder
    from edge_sdk.mqtt import MqttTransport
    from edge_server.broker import EmbeddedBroker
    from edge_server.coordinator import RECEIVE_MAXIMUM, Coordinator
    from edge_server.registry import Registry
    from edge_server.service import listen, run
    from edge_server.settings import SETTINGS_NAME, is_loopback, load_settings

    if not logging.getLogger("edge_server").isEnabledFor(logging.DEBUG):
        logging.getLogger("edge_server").setLevel(logging.INFO)
    settings = load_settings(home / SETTINGS_NAME)
    broker, port = settings.broker, settings.broker.port
    if broker.embedded and not expose_broker and not is_loopback(broker.host):
        raise ConfigError(
            f"broker.host {broker.host!r} can be reached from other machines, and the embedded broker checks no "
            "passwords: use mosquitto, or --expose-broker on a network that you trust"
        )
    with open_registry(home) as registry:
        tls = registry.identities.tls()
        if not is_loopback(settings.http.host) and not registry.users.exist():
            raise ConfigError(
                f"http.host {settings.http.host!r} can be reached from other machines and there are no users, so that "
                "everybody could give orders: edge-coordinator users add NAME --role releaser"
            )
    with ExitStack() as stack:
        stack.enter_context(lock_folder(home))
        if broker.embedded:
            port = stack.enter_context(EmbeddedBroker(host=broker.host, port=broker.port)).port
        transport = MqttTransport(
            broker.host,
            port,
            client_id=f"coordinator-{settings.prefix}",
            username=broker.username,
            password=_password(home, broker.password_file),
            tls=tls,
            receive_maximum=RECEIVE_MAXIMUM,
            max_inbox=2 * RECEIVE_MAXIMUM,
        )
        listener = listen(settings.http)
        stack.callback(listener.close)
        coordinator = Coordinator(home, transport=transport, settings=settings)
        records = Registry(home, settings=settings)
        host, http_port = listener.getsockname()[:2]
        scheme = "https" if settings.http.is_tls else "http"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{http_port}/"

        def announce() -> None:
            text = f"dashboard {url}  broker {broker.host}:{port}"
            tell(text, as_json=as_json, dashboard=url, broker=f"{broker.host}:{port}")

        run(coordinator, records, listener, on_ready=announce)


def _password(home: Path, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return (home / name).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"broker.password_file {name!r} cannot be read: {error}") from error


# the commands of each family are in its `cli_*.py`, which imports nothing heavy before one of them runs
for family in (
    build,
    candidates,
    push,
    rollout,
    group,
    devices,
    segments,
    releases,
    fleet,
    alerts,
    keys,
    broker_files,
    command,
    commands,
    export,
    audit,
    backup,
    restore,
    upgrade,
    users,
):
    main.add_command(family)
