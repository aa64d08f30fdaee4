"""`edge`: the device's command line. Environment is read here and nowhere below."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
import msgspec
from platformdirs import user_data_path

from edge_sdk import __version__
from edge_sdk.drift.cli import drift
from edge_sdk.errors import ArtifactError, ConfigError, EdgeError, MissingExtraError, ProtocolError, TransportError
from edge_sdk.simulate_cli import simulate

if TYPE_CHECKING:
    from edge_sdk.device import EdgeDevice
    from edge_sdk.installed import Use
    from edge_sdk.slots import Version
    from edge_sdk.store import HistoryEntry, Lineage, Store

T = TypeVar("T")
EXIT_FAILED, EXIT_USAGE, EXIT_INTEGRITY, EXIT_NETWORK = 1, 2, 3, 4
CONFIG_NAME = "device.toml"


class _BundleBroker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str
    port: int
    username: str = ""
    password: str = ""
    tls: bool = False
    ca: str = ""
    certificate: str = ""
    key: str = ""


class Bundle(msgspec.Struct, frozen=True):
    """What `edge-coordinator devices add` wrote for this device."""

    schema: int
    device: str
    group: str
    prefix: str
    broker: _BundleBroker
    command_key: str = ""
    root: str = ""
    """TUF root metadata as it is, or nothing: then updates are not signed."""


class _Group(click.Group):
    """Turns the SDK's errors into one line and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run."""
        try:
            return super().main(*args, **kwargs)
        except EdgeError as error:
            if "--debug" in sys.argv:
                raise
            click.echo(f"edge: {error}", err=True)
            sys.exit(exit_code(error))
        except OSError as error:  # a folder of somebody else's, a full disk: what to do is in its own words
            if "--debug" in sys.argv:
                raise
            click.echo(f"edge: {error.filename or 'a file'}: {error.strerror or error}", err=True)
            sys.exit(EXIT_FAILED)


def exit_code(error: EdgeError) -> int:
    """The documented exit code of an error."""
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    if isinstance(error, ArtifactError):
        return EXIT_INTEGRITY
    if isinstance(error, TransportError):
        return EXIT_NETWORK
    return EXIT_FAILED


def _default_home() -> Path:
    return Path(os.environ.get("EDGE_HOME") or user_data_path("edge-sdk"))


home_option = click.option(
    "--home", type=click.Path(path_type=Path), default=None, help="The device's folder [EDGE_HOME, or per user]."
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge")
@click.option("--debug", is_flag=True, help="Show tracebacks, log more.")
def main(debug: bool) -> None:
    """Run and look after one device.

    Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 integrity, 4 network.
    """
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)


@main.command()
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@home_option
@click.option("--force", is_flag=True, help="Replace an earlier enrolment.")
def enroll(bundle: Path, home: Path | None, force: bool) -> None:
    """Install the BUNDLE that `edge-coordinator devices add` wrote."""
    from edge_sdk import identity
    from edge_sdk.config import DeviceConfig
    from edge_sdk.files import replace_file
    from edge_sdk.messages import check_name
    from edge_sdk.trust import ROOT_NAME, version_of

    try:
        content = msgspec.json.decode(bundle.read_bytes(), type=Bundle)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{bundle} is not an enrolment bundle: {error}") from error
    if content.schema != 1:
        raise ConfigError(f"{bundle} has schema {content.schema}, this SDK reads 1; update the SDK")
    text = _device_toml(content).encode()
    try:
        for name, what in ((content.device, "device name"), (content.group, "group"), (content.prefix, "topic prefix")):
            check_name(name, what)
        msgspec.toml.decode(text, type=DeviceConfig)
        if content.root:
            version_of(content.root.encode())
    except (ProtocolError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{bundle} does not fit a device: {error}") from error
    folder = home or _default_home()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / CONFIG_NAME
    if target.exists() and not force:
        raise ConfigError(f"{target} exists: this device is enrolled already; use --force to replace it")
    root = folder / ROOT_NAME
    if root.exists() and not content.root:
        raise ConfigError(
            f"{root} says whom this device trusts, and the bundle has no root: nothing was changed. To give up signed "
            "updates, delete the file yourself"
        )
    given = content.broker
    identity.install(folder, ca=given.ca, certificate=given.certificate, key=given.key)
    if content.root:  # first: a device with settings and no root would refuse every release, which is the safe side
        replace_file(root, content.root.encode())
    replace_file(target, text, mode=0o600)
    target.chmod(0o600)
    if not content.root:
        click.echo("updates of this device are NOT signed: its coordinator has no keys (update.trust = none)", err=True)
    click.echo(f"enrolled as {content.device} in group {content.group}; start with: edge run --home {folder}")


def _device_toml(bundle: Bundle) -> str:
    quote = json.dumps  # a JSON string is a TOML string
    return (
        f"device = {quote(bundle.device)}\ngroup = {quote(bundle.group)}\nprefix = {quote(bundle.prefix)}\n"
        f"command_key = {quote(bundle.command_key)}\n\n"
        f"[broker]\nhost = {quote(bundle.broker.host)}\nport = {bundle.broker.port}\n"
        f"username = {quote(bundle.broker.username)}\npassword = {quote(bundle.broker.password)}\n"
        f"{_tls_toml(bundle.broker)}\n"
        f"[update]\ntrust = {quote('root' if bundle.root else 'none')}\n"
    )


def _tls_toml(broker: _BundleBroker) -> str:
    from edge_sdk.identity import CA_FILE, CERT_FILE, KEY_FILE

    files = {"ca_file": CA_FILE if broker.ca else ""}
    if broker.certificate:
        files |= {"cert_file": CERT_FILE, "key_file": KEY_FILE}
    lines = [f"{key} = {json.dumps(name)}\n" for key, name in files.items()]
    return "".join(["tls = true\n", *lines]) if broker.tls else ""


@main.command()
@home_option
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="To start with.")
def run(home: Path | None, checkpoint: Path | None) -> None:
    """Run the device from its device.toml until SIGTERM. Tells systemd that it is ready and alive."""
    from edge_sdk.systemd import supervised

    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    with _own_device(home, checkpoint) as device, supervised(device.status, os.environ):
        click.echo(f"{device.name} runs; stop with SIGTERM", err=True)
        stop.wait()
    click.echo(f"{device.name} stopped", err=True)


def _own_device(home: Path | None, checkpoint: Path | None) -> EdgeDevice:
    """The device that this process is, not started yet."""
    from edge_sdk.config import load_config
    from edge_sdk.device import EdgeDevice

    folder = home or _default_home()
    path = folder / CONFIG_NAME
    if not path.exists():
        raise ConfigError(f"{path} is missing: `edge enroll` writes it; without a coordinator an empty one will do")
    device = EdgeDevice(folder, checkpoint=checkpoint, config=load_config(path))
    if not device.ready and not device.config.broker.host:
        device.stop()
        raise ConfigError(f"{folder} has no release, and {path} no broker to get one from: give a --checkpoint")
    return device


@main.command()
@home_option
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="To start with.")
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Answer on this Unix socket, its owner only.")
@click.option("--port", type=click.IntRange(0, 65535), help="Answer on this port of this machine; 0: any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --port: 127.0.0.1 or ::1.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Predictions at a time.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(0), help="Requests that wait; then 429.")
@click.option("--max-body-mb", default=16, show_default=True, type=click.IntRange(1), help="Of a request; then 413.")
def serve(
    home: Path | None,
    checkpoint: Path | None,
    path: Path | None,
    port: int | None,
    host: str,
    workers: int,
    queue: int,
    max_body_mb: int,
) -> None:
    """Run the device as `edge run` does, and answer apps of this machine over HTTP."""
    try:
        from edge_sdk import http
    except ImportError as error:
        raise MissingExtraError("edge serve", "serve") from error
    from edge_sdk.systemd import supervised

    limits = http.Limits(workers=workers, queue=queue, max_body_bytes=max_body_mb * 1_000_000)
    if path is not None and port is None:
        listening = http.listen_unix(path)
    elif port is not None and path is None:
        listening = http.listen_loopback(host, port)
    else:
        raise click.UsageError("give either --socket PATH or --port NUMBER")
    with (
        listening as listener,
        _own_device(home, checkpoint) as device,
        supervised(device.status, os.environ),
    ):
        where = http.address_of(listener)
        http.serve(device, listener, limits, on_ready=lambda: click.echo(f"{device.name} answers on {where}", err=True))
    click.echo(f"{device.name} stopped", err=True)


version_options = (
    home_option,
    click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path),
                 help="A checkpoint folder in place of a device."),
    click.option("--variant", type=click.Choice(["int8", "fp32"]), help="[default: what the device serves]"),
)  # fmt: skip


def _version_options(command: Any) -> Any:
    """Options that say which version is meant."""
    for option in reversed(version_options):
        command = option(command)
    return command


@main.command()
@click.option(
    "--input",
    "source",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help=".csv, .parquet, .npy or .npz, or a folder of .npy files or images.",
)
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Ends in .csv, .jsonl or .parquet."
)
@_version_options
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Samples at once.")
@click.option("--id-column", help="Column of a table that names its rows; else they are numbered from 0.")
@click.option("--restart", is_flag=True, help="Begin anew, whatever an earlier run has left.")
@click.option("--allow-errors", is_flag=True, help="Exit with 0 although rows were refused.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def predict(
    source: Path,
    output: Path,
    home: Path | None,
    checkpoint: Path | None,
    variant: Literal["int8", "fp32"] | None,
    batch: int,
    id_column: str | None,
    restart: bool,
    allow_errors: bool,
    quiet: bool,
) -> None:
    """Score a file or folder of samples, beside a running device or without one.

    A run that was stopped goes on where it stopped, with the same command. A row that the model cannot take has an
    error in place of a prediction, and the exit code is 1 when all rows are done. These predictions are not logged, not
    watched for drift, and wait for no labels.
    """
    from edge_sdk.batch import begun_variant, score
    from edge_sdk.installed import load

    begun = None if restart else begun_variant(output)
    served = _with_version(home, checkpoint, variant or begun, load)
    with _progress_bar(f"scoring {source.name}", hidden=quiet) as progress:
        summary = score(served, source, output, batch=batch, id_column=id_column, restart=restart, progress=progress)
    refused = sum(summary.refused.values())
    if not quiet:
        if summary.left_out:
            click.echo(f"columns left out: {', '.join(summary.left_out)}", err=True)
        counted = ", ".join(f"{count} {kind}" for kind, count in summary.refused.items())
        click.echo(
            f"{output.name}: {summary.rows} rows"
            + (f", {summary.resumed} of them done before" if summary.resumed else "")
            + (f", {refused} refused ({counted})" if refused else ""),
            err=True,
        )
    if refused and not allow_errors:
        sys.exit(EXIT_FAILED)


@contextmanager
def _progress_bar(label: str, *, hidden: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal; nothing anywhere else."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show


def _with_version(
    home: Path | None, checkpoint: Path | None, variant: Literal["int8", "fp32"] | None, use: Use[T]
) -> T:
    """Use the version that the options mean."""
    from edge_sdk.config import load_config
    from edge_sdk.installed import from_checkpoint, from_home

    if checkpoint is not None and home is not None:
        raise click.UsageError("give either --home or --checkpoint")
    if checkpoint is not None:
        return from_checkpoint(checkpoint, variant or "auto", use)
    folder = home or _default_home()
    settings = folder / CONFIG_NAME
    configured = load_config(settings).variant if variant is None and settings.exists() else "auto"
    return from_home(folder, variant or configured, use)


@main.command()
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Ends in .onnx.")
@_version_options
@click.option("--latent", is_flag=True, help="Put the latent out as well.")
def export(
    output: Path,
    home: Path | None,
    checkpoint: Path | None,
    variant: Literal["int8", "fp32"] | None,
    latent: bool,
) -> None:
    """Write trunk and learned head as one ONNX file for other runtimes, with labels and release in its metadata."""
    from edge_sdk import installed
    from edge_sdk.files import replace_file

    if output.suffix.lower() != ".onnx" or not output.parent.is_dir():
        raise ConfigError(f"{output}: expected a name ending in .onnx, in a folder that is there")
    data = _with_version(home, checkpoint, variant, partial(installed.export, latent=latent))
    replace_file(output, data)
    click.echo(f"{output}: {len(data)} bytes", err=True)


@main.command()
@home_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(home: Path | None, as_json: bool) -> None:
    """Show how the device was when it last saved its state (once a minute, and when it stops)."""
    with _open_store(home) as store:
        found = _saved_status(store)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    counters = found.pop("counters")
    found["shadow"] = _shadow_line(found.get("shadow"))
    for part in found, counters:
        for key, value in part.items():
            click.echo(f"{key:22} {_listed(value) if isinstance(value, list | dict) else value}")
        if part is found:
            click.echo("\nsince the database was made")


def _shadow_line(shadow: dict[str, Any] | None) -> str:
    if shadow is None:
        return ""
    since = datetime.fromtimestamp(shadow["since"], UTC).isoformat(timespec="seconds") if shadow["since"] else "now"
    decided = (
        "a head is being trained for it"
        if shadow["training"]
        else f"decided with {shadow['pairs_wanted']}, or in {shadow['left_s'] / 3600:.1f} hours"
    )
    return f"release {shadow['release']} since {since}: {shadow['pairs']} inputs passed both trunks; {decided}"


def _listed(value: list[str] | dict[str, int]) -> str:
    return ", ".join([f"{name} ({count})" for name, count in value.items()] if isinstance(value, dict) else value)


@main.command()
@home_option
@click.option("--heads", is_flag=True, help="How each learned head came to be, or why it did not.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), help="Entries.")
@click.option(
    "--json", "as_json", is_flag=True, help="As JSON lines; of heads with all settings and the whole verdict."
)
def history(home: Path | None, heads: bool, limit: int, as_json: bool) -> None:
    """Show what happened: drift, learning, verdicts, releases, rollbacks."""
    with _open_store(home) as store:
        made = store.lineage(limit=limit) if heads else []
        happened = [] if heads else store.history(limit=limit)
    if as_json:
        for line in [*(entry._asdict() for entry in made), *(entry._asdict() for entry in happened)]:
            click.echo(json.dumps(line))
    elif heads:
        _echo_table(_HEAD_COLUMNS, [_head_line(entry) for entry in made])
    else:
        for entry in happened:
            click.echo(_event_line(entry))


def _event_line(entry: HistoryEntry) -> str:
    detail = "  ".join(f"{key}={value}" for key, value in entry.detail.items())
    return f"{_when(entry.time)}  {entry.name:20} {detail}"


_HEAD_COLUMNS = ("time", "release", "parent", "head", "outcome", "rows", "seed", "before", "after", "evidence", "cpu s",
                 "reason")  # fmt: skip
"""Before and after: accuracy on the judge rows."""


def _head_line(entry: Lineage) -> list[str]:
    detail = entry.detail
    judged = bool(detail.get("rows"))
    verdict = [f"{detail.get(key, 0):.3f}" if judged else "-" for key in ("champion", "challenger", "evidence")]
    return [
        _when(entry.time),
        str(entry.release),
        str(entry.parent),
        "-" if entry.head is None else str(entry.head),
        entry.outcome,
        str(detail["fresh"]),
        str(detail["seed"]),
        *verdict,
        f"{detail['cpu_s']:.1f}",
        f"{detail['trigger']}: {detail['reason']}",
    ]


@main.command()
@home_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def skew(home: Path | None, as_json: bool) -> None:
    """Show where the learned head's score falls between training and use, and what that says."""
    from edge_sdk.progress import saved_state
    from edge_sdk.skew import findings

    with _open_store(home) as store:
        scores = saved_state(store).skew
    table, found = scores.table(), findings(scores)
    if as_json:
        click.echo(json.dumps({"scores": [row._asdict() for row in table], "findings": found}, indent=2))
        return
    if not table:
        click.echo("no score has 10 rows yet: they come with the first promotion, and with labels after it")
        return
    rows = [[row.name, f"{row.score:.3f}", str(row.rows), "{:.3f} to {:.3f}".format(*row.interval)] for row in table]
    _echo_table(("rows", "right", "count", "95 % interval"), rows)
    for line in found or ["nothing stands out"]:
        click.echo(line)


@main.command()
@home_option
@click.option("--accept", "accepted", multiple=True, metavar="LABEL", help="It may be learned; may be repeated.")
@click.option("--refuse", "refused", multiple=True, metavar="LABEL", help="It is none: its samples are erased.")
def labels(home: Path | None, accepted: tuple[str, ...], refused: tuple[str, ...]) -> None:
    """List labels that the model does not know, with their samples, or say what becomes of them.

    With --accept or --refuse the device must not be running.
    """
    if not (accepted or refused):
        with _open_store(home) as store:
            waiting = _saved_status(store)["new_labels"]
        for label, count in waiting.items():
            click.echo(f"{label}  {count} samples")
        if not waiting:
            click.echo("no new label waits")
        return
    with _stopped_device(home) as device:
        for label in accepted:
            device.accept_label(label)
            click.echo(f"{label} may be learned")
        for label in refused:
            device.refuse_label(label)
            click.echo(f"{label} is refused, and its samples are erased")


@main.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@home_option
@click.option("--all", "everything", is_flag=True, help="All labelled samples, sums over them, and the learned head.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget(ids: tuple[str, ...], home: Path | None, everything: bool, yes: bool) -> None:
    """Erase what is kept of the predictions ID, or with --all all that was learned (the device must not be running).

    What a head in use has learned of single predictions stays in its weights; --all gives up the head as well.
    """
    if bool(ids) == everything:
        raise click.UsageError("give either ids of predictions or --all")
    if everything and not yes:
        click.confirm("Erase all labelled samples, all sums over them, and the learned head?", abort=True)
    with _stopped_device(home) as device:
        if everything:
            _echo_version(device.forget_all())
        else:
            click.echo(f"{device.forget(ids)} rows erased")


@main.command()
@home_option
def rollback(home: Path | None) -> None:
    """Go back to the version before the last change (the device must not be running)."""
    with _stopped_device(home) as device:
        _echo_version(device.rollback())


@main.command()
@home_option
def reset(home: Path | None) -> None:
    """Drop the learned head and serve the release's own (the device must not be running)."""
    with _stopped_device(home) as device:
        _echo_version(device.reset_to_base())


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify(checkpoint: Path) -> None:
    """Check a CHECKPOINT folder as a device would: hashes, sizes, self-test here, and all that learning needs."""
    from edge_sdk.manifest import verify_checkpoint
    from edge_sdk.selftest import choose_variant
    from edge_sdk.upgrade import rehearse

    manifest = verify_checkpoint(checkpoint)
    choice = choose_variant(checkpoint, manifest, "auto")
    rehearse(checkpoint, manifest)
    found = f"{len(manifest.files)} files ok, self-test ok, {choice.variant} ({choice.reason})"
    click.echo(f"{manifest.name} release {manifest.release}: {found}")


@main.command()
@home_option
def privacy(home: Path | None) -> None:
    """List every field that can leave the device, and how many bytes did."""
    from edge_sdk import messages

    for kind in messages.SENT_BY_DEVICES:
        click.echo(f"{kind.__name__}: {', '.join(kind.__struct_fields__)}")
    click.echo(
        "What the detail of each event holds: docs/protocol.md, section 7.\n"
        "No input, latent or single label leaves the device; counts below report.min_count are merged or held back.\n"
        "Names of labels (new ones too), features and metrics leave it; slices, sources, rewards, requests and ids of\n"
        "predictions do not."
    )
    if ((home or _default_home()) / "edge.db").exists():
        with _open_store(home) as store:
            counters = json.loads(store.get("counters") or b"{}")
        click.echo(f"sent so far: {counters.get('bytes_sent', 0)} bytes of reports and events")


main.add_command(drift)
main.add_command(simulate)


def _address(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise click.BadParameter(f"an address is HOST:PORT, got {value!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


@main.command()
@click.option("--to", required=True, metavar="HOST:PORT", callback=_address, help="The broker.")
@click.option(
    "--listen",
    default="127.0.0.1:0",
    show_default=True,
    metavar="HOST:PORT",
    callback=_address,
    help="Where devices connect instead; port 0: any free one.",
)
@click.option("--latency", "latency_s", default=0.0, metavar="S", help="Seconds that a byte takes one way.")
@click.option("--jitter", "jitter_s", default=0.0, metavar="S", help="Up to so many seconds more.")
@click.option("--loss", default=0.0, metavar="SHARE", help="Of segments that come after a retransmission.")
@click.option(
    "--retransmit", "retransmit_s", default=0.2, show_default=True, metavar="S", help="Until one is sent again."
)
@click.option("--bandwidth", default=0.0, metavar="BYTES", help="A second, of each line and direction; 0: no limit.")
@click.option("--life", "life_s", default=0.0, metavar="S", help="Mean life of a new connection; 0: it lasts.")
@click.option("--half-open", default=0.0, metavar="SHARE", help="Of lost connections that fall silent.")
@click.option("--refuse", default=0.0, metavar="SHARE", help="Of new connections that are reset at once.")
@click.option(
    "--partition-every", "partition_every_s", default=0.0, metavar="S", help="From one partition to the next."
)
@click.option("--partition", "partition_s", default=0.0, metavar="S", help="How long each lasts.")
@click.option("--seed", default=0, show_default=True, help="Of all chance.")
def faults(to: tuple[str, int], listen: tuple[str, int], seed: int, **network: float) -> None:
    """Make the network between devices and a broker bad, until SIGTERM: a proxy with faults."""
    from edge_sdk.faults import FaultProxy, Faults

    try:
        proxy = FaultProxy(to, listen=listen, faults=Faults(**network), seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    with proxy:
        click.echo(f"{proxy.host}:{proxy.port} leads to {to[0]}:{to[1]}; stop with SIGTERM", err=True)
        stop.wait()


class _open_store:  # noqa: N801 - reads as a function
    """The device's database, which may be in use by the running device."""

    def __init__(self, home: Path | None) -> None:
        path = _device_home(home) / "edge.db"
        from edge_sdk.store import Store

        self._store = Store(path, writes=False)

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def _device_home(home: Path | None) -> Path:
    folder = home or _default_home()
    if not (folder / "edge.db").exists():
        raise ConfigError(f"there is no device in {folder}: use --home, or run one first")
    return folder


def _saved_status(store: Store) -> dict[str, Any]:
    from edge_sdk.status import STATUS_KEY

    data = store.get(STATUS_KEY)
    if data is None:
        raise ConfigError(
            "the device has not saved its state yet: it does so within a minute of its start, and when it stops"
        )
    found: dict[str, Any] = json.loads(data)
    return found


@contextmanager
def _stopped_device(home: Path | None) -> Iterator[EdgeDevice]:
    """The device itself, to change it; refused while another process has its folder."""
    from edge_sdk.config import DeviceConfig, load_config
    from edge_sdk.device import EdgeDevice

    folder = _device_home(home)
    path = folder / CONFIG_NAME
    device = EdgeDevice(folder, config=load_config(path) if path.exists() else DeviceConfig())
    try:
        yield device
    finally:
        device.stop()


def _echo_version(version: Version) -> None:
    click.echo(f"release {version.release}, head {version.head} will serve")


def _echo_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
