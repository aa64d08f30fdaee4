"""The coordinator's settings: frozen structs, read from `coordinator.toml`. A typo is an error."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.messages import DEFAULT_PREFIX, check_name
from edge_server.alert_settings import AlertSettings
from edge_server.fleet_drift import DriftRules
from edge_server.freshness import CostSettings
from edge_server.plan import RolloutRules

SETTINGS_NAME = "coordinator.toml"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(port: int, *, lowest: int) -> None:
    if not lowest <= port <= 65535:
        raise ValueError(f"port must lie in {lowest} to 65535, got {port}")


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the MQTT broker is.

    Attributes:
        host: Address the coordinator connects to, or that the embedded broker listens on.
        port: TCP port; 0 lets the embedded broker take any.
        embedded: Start the demo broker in this process; it checks no passwords.
        public_host: Address that devices are told, if it differs from `host`.
        username: Name to log in with; None: anonymous.
        password_file: File that holds the password alone.
        tls: Encrypt, and let certificates say who is who; see docs/brokers.md.
        ca_file: Certificates of whoever signed the broker's; None: an authority of the coordinator's own, which signs
            the broker's, the devices' and the coordinator's.
        cert_file: With `ca_file`: the coordinator's certificate, if the broker asks for one.
        key_file: With `cert_file`: its private key.
        certificate_days: How long certificates of its own authority are good.
        renew_days: So long before its end a device's certificate is replaced by a later one.
    """

    host: str = "127.0.0.1"
    port: int = 1883
    embedded: bool = False
    public_host: str | None = None
    username: str | None = None
    password_file: str | None = None
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    certificate_days: float = 365.0
    renew_days: float = 90.0

    def __post_init__(self) -> None:
        _check_port(self.port, lowest=0 if self.embedded else 1)
        if self.tls and self.embedded:
            raise ValueError("the embedded broker knows no TLS: set embedded or tls to false")
        if not (0 < self.certificate_days <= 3650 and 0 <= self.renew_days < self.certificate_days):
            raise ValueError("certificate_days must lie above 0 and up to 3650, renew_days below it")
        if not self.host:
            raise ValueError("host must not be empty")


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the API and the dashboard listen, and how much they take from whom.

    Attributes:
        host: Address; one that other machines can reach needs TLS and users.
        port: TCP port; 0 takes any.
        cert_file: Certificate (PEM, with those between it and the authority's), relative to the home folder: TLS.
        key_file: Its private key.
        public_url: What people and devices call it, if a proxy on this machine stands before it: its name is answered
            to, what the proxy says of the client's address is believed, and with https cookies are sent over TLS only.
        session_hours: So long after logging in the dashboard asks for the token again.
        requests_per_minute: Of one address, and of one user; updates are not counted.
        logins_per_minute: Wrong tokens of one address, here and over the API.
        max_upload_bytes: Largest checkpoint that is taken over the API, as the archive that it comes in.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    cert_file: str | None = None
    key_file: str | None = None
    public_url: str | None = None
    session_hours: float = 12.0
    requests_per_minute: int = 600
    logins_per_minute: int = 10
    max_upload_bytes: int = 2_147_483_648

    def __post_init__(self) -> None:
        _check_port(self.port, lowest=0)
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file come together")
        if self.public_url is not None:
            url = urlsplit(self.public_url)
            if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/") or url.query:
                raise ValueError(f"public_url must be like https://name or https://name:port, got {self.public_url!r}")
        if not is_loopback(self.host) and not self.is_tls:
            raise ValueError(
                f"host {self.host!r} is not a loopback address, and tokens would cross the network in the clear: set "
                "cert_file and key_file, or stay on 127.0.0.1 behind a proxy (public_url) or an SSH tunnel"
            )
        if self.max_upload_bytes < 1:
            raise ValueError(f"max_upload_bytes must be 1 or more, got {self.max_upload_bytes}")
        for name in ("session_hours", "requests_per_minute", "logins_per_minute"):
            if not 0 < getattr(self, name) <= 1_000_000:
                raise ValueError(f"{name} must lie above 0 and up to 1000000, got {getattr(self, name)}")

    @property
    def is_tls(self) -> bool:
        """The server itself speaks TLS."""
        return self.cert_file is not None

    @property
    def is_secure(self) -> bool:
        """Browsers speak TLS, with this server or a proxy before it."""
        return self.is_tls or (self.public_url or "").startswith("https:")


class SigningSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long signatures are good, once keys were made. The coordinator renews all but the root's at half the time.

    Attributes:
        timestamp_days: Devices that hear of no newer one for so long install nothing.
        snapshot_days: As above.
        targets_days: As above.
        root_days: Until the owners of the root keys must sign again (`keys renew`).
        keep_releases: So many of the newest releases stay signed, beside those that a group is told to run.
        patches_from: Patches are made from so many of the releases before; 0: none.
    """

    timestamp_days: float = 7.0
    snapshot_days: float = 30.0
    targets_days: float = 180.0
    root_days: float = 730.0
    keep_releases: int = 50
    patches_from: int = 2

    def __post_init__(self) -> None:
        for name in ("timestamp_days", "snapshot_days", "targets_days", "root_days"):
            if not 0 < getattr(self, name) <= 36_500:
                raise ValueError(f"{name} must lie above 0 and up to 36500, got {getattr(self, name)}")
        if not 1 <= self.keep_releases <= 100:
            raise ValueError(f"keep_releases must lie in 1 to 100, got {self.keep_releases}")
        if self.patches_from < 0:
            raise ValueError(f"patches_from must be 0 or more, got {self.patches_from}")


class RetentionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long rows are kept; days, 0 for ever. Sums over days are always kept.

    Attributes:
        reports_days: Reports as they came. Rollouts are judged by them: longer than any stage lasts.
        events_days: Events.
        summaries_days: Summaries as they came, usually one an hour: above 0 and up to 31. Then those of a day are added
            up. Rollouts are judged by them, too.
        day_summaries_days: Summaries of days.
        minutes_days: Sums over minutes.
        hours_days: Sums over hours.
    """

    reports_days: float = 7.0
    events_days: float = 365.0
    summaries_days: float = 7.0
    day_summaries_days: float = 365.0
    minutes_days: float = 2.0
    hours_days: float = 31.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) <= 36_500:
                raise ValueError(f"{name} must lie in 0 to 36500, got {getattr(self, name)}")
        if not 0 < self.summaries_days <= 31:
            raise ValueError(f"summaries_days must lie above 0 and up to 31, got {self.summaries_days}")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the coordinator can be told.

    Attributes:
        prefix: First level of every topic.
        accept_unknown: Take in devices that were not added with `devices add`.
        durable: Flush every commit to disk before it is acknowledged; False only for simulations.
        rollout_interval_s: Time between two looks at the rollouts.
        collisions: Whether a rollout for devices that another one is under way for is refused, or queued behind it.
        blocks_per_turn: Most blocks published in one turn.
        max_queued_blocks: Most blocks waiting to be published; devices ask again for the rest.
        repeat_blocks_s: A block of a file of more than 8 is not sent again within this time, for it is on its way to
            whoever asks; one of a smaller file not within a fifth of it. 0 where the clock stands still: simulations.
        database: File of the database, relative to the home folder.
        blobs: Folder of the releases' files, relative to the home folder.
    """

    prefix: str = DEFAULT_PREFIX
    accept_unknown: bool = False
    durable: bool = True
    rollout_interval_s: float = 5.0
    collisions: Literal["refuse", "queue"] = "refuse"
    blocks_per_turn: int = 64
    max_queued_blocks: int = 16384
    repeat_blocks_s: float = 0.5
    database: str = "coordinator.db"
    blobs: str = "blobs"
    broker: BrokerSettings = BrokerSettings()
    http: HttpSettings = HttpSettings()
    signing: SigningSettings = SigningSettings()
    retention: RetentionSettings = RetentionSettings()
    rollout: RolloutRules = RolloutRules()
    fleet: DriftRules = DriftRules()
    costs: CostSettings = CostSettings()
    alerts: AlertSettings = AlertSettings()

    def __post_init__(self) -> None:
        try:
            check_name(self.prefix, "topic prefix")
        except ProtocolError as error:
            raise ValueError(str(error)) from error
        for name in ("rollout_interval_s", "blocks_per_turn", "max_queued_blocks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.repeat_blocks_s >= 0:
            raise ValueError(f"repeat_blocks_s must be 0 or more, got {self.repeat_blocks_s}")


def load_settings(path: Path) -> Settings:
    """The settings in a TOML file.

    Raises:
        ConfigError: The file is missing or no TOML, or a key is unknown or out of range; names both.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Settings)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; make it with: edge-coordinator init --home {path.parent}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from error
