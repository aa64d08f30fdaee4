"""Who is who: command keys, certificates, what the broker has to know of them, and orders to single devices."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edge_sdk.clock import Clock
from edge_sdk.commands import KEY_BYTES, check_order, sign
from edge_sdk.errors import ConfigError, MissingExtraError, ProtocolError, StoreError
from edge_sdk.files import remove_tree, replace_file, storage_error
from edge_sdk.messages import UP, Command, Order
from edge_sdk.mqtt import Tls
from edge_server.enrol import Bundle, Credentials, coordinator_name, password_file, replace
from edge_server.errors import SigningError, UnknownDeviceError
from edge_server.records import CommandRecord
from edge_server.settings import Settings
from edge_server.store import Store

if TYPE_CHECKING:
    from edge_server.authority import Authority

SECRET_NAME = "commands.key"  # noqa: S105 - the name of a file
CA_FOLDER = "ca"
_FILES = {"authority": CA_FOLDER, "commands": SECRET_NAME}
_DAY_S = 86_400.0
_RENEWAL_S = 14 * _DAY_S
"""So long a new certificate is offered to a device before another is made."""


class Identities:
    """What devices and the coordinator prove who they are with. To be used by one thread at a time.

    Args:
        home: The coordinator's folder.
        store: Its database.
        settings: Its settings.
        clock: Where the time comes from.
    """

    def __init__(self, home: Path, *, store: Store, settings: Settings, clock: Clock) -> None:
        self._home, self._store, self._settings, self._clock = home, store, settings, clock
        self._secret: bytes | None = None
        self._trusted: set[str] = set()

    @property
    def authority(self) -> Authority:
        """The coordinator's own certificate authority; made when it is first needed, and never a second time.

        Raises:
            MissingExtraError: `cryptography` is not installed.
            SigningError: It is missing or another one, and devices have certificates of the one that was here.
        """
        try:
            from edge_server.authority import Authority  # noqa: PLC0415 - only with TLS
        except ImportError as error:
            raise MissingExtraError("certificates", "server") from error
        authority = Authority(self._home / CA_FOLDER)
        was_there = self._store.secrets.exists(CA_FOLDER)  # asked first: another process may be making it
        if not authority.exists:
            self._require_new("authority", was_there=was_there)
            authority.make(self._clock.now())
        self._trust("authority", authority.ca_pem.encode())
        return authority

    def start_over(self, what: Literal["authority", "commands"], *, actor: str) -> None:
        """Give up the authority or the secret of commands, lost or known to others, for a new one.

        What devices were given by it is good no longer: each has to be replaced. The old files stay as `*.replaced`.

        Raises:
            StoreError: The files cannot be moved or written.
        """
        path = self._home / _FILES[what]
        aside = path.with_name(f"{path.name}.replaced")
        with self._store.transaction():
            self._store.secrets.forget(path.name)
            if what == "authority":
                self._store.certificates.forget()
            self._store.audit.add(self._clock.now(), actor, f"{what} made anew", {})
        self._trusted.discard(what)
        self._secret = None
        try:
            if path.exists():
                if aside.is_dir():
                    remove_tree(aside)
                path.replace(aside)
        except OSError as error:
            raise storage_error(error, f"cannot move {path} aside") from error
        if what == "commands":
            self._load_secret()
        elif self._settings.broker.tls and self._settings.broker.ca_file is None:
            self._write_crl()

    def _require_new(self, what: str, *, was_there: bool) -> None:
        """Refuse to make a second secret: no device would believe what it signs."""
        if was_there:
            raise SigningError(
                f"{self._home / _FILES[what]} is missing, and devices trust what was there, nothing else: put it back "
                f"from a backup made with --keys; if it is lost for good: edge-coordinator keys start-over {what}"
            )

    def _trust(self, what: str, data: bytes) -> None:
        """Hold what was read against what the database knows; once is enough."""
        name = _FILES[what]
        if what in self._trusted:
            return
        if not self._store.secrets.is_known(name, data):
            with self._store.transaction():
                known = self._store.secrets.note(name, data)
            if not known:
                raise SigningError(
                    f"{self._home / name} is not what this coordinator's devices trust: put back the one that belongs "
                    f"to this database; if it is lost for good: edge-coordinator keys start-over {what}"
                )
        self._trusted.add(what)

    # ---- devices

    def credentials(self, name: str, *, enrolment: int = 1) -> Credentials:
        """What a device is given beside its password.

        Args:
            name: Of the device.
            enrolment: How often it has been enrolled then: each time it gets another command key.
        """
        key = self._key(name, enrolment).hex()
        broker = self._settings.broker
        if not broker.tls:
            return Credentials(command_key=key)
        if broker.ca_file is not None:  # somebody else's authority signs the broker's and the devices' certificates
            return Credentials(command_key=key, ca=self._text(broker.ca_file))
        issued = self.authority.issue(name, days=broker.certificate_days, now=self._clock.now())
        return Credentials(
            command_key=key,
            ca=self.authority.ca_pem,
            certificate=issued.certificate,
            key=issued.key,
            serial=issued.serial,
            expires=issued.expires,
        )

    def replace(self, name: str, *, out: Path, actor: str, root: str = "") -> Bundle:
        """Enrol a device anew, as a new one that takes the name: what the old one has is good no longer.

        Raises:
            UnknownDeviceError: It was never added.
            StoreError: The bundle exists already or cannot be written.
        """
        record = self._store.devices.get(name)
        if record is None:
            raise UnknownDeviceError(f"there is no device {name!r}: add it")
        number = self._store.devices.enrolments(name) + 1
        bundle = replace(
            self._store,
            self._settings,
            name,
            group=record.group,
            out=out,
            actor=actor,
            now=self._clock.now(),
            credentials=self.credentials(name, enrolment=number),
            root=root,
        )
        self._write_crl()
        return bundle

    def revoke(self, name: str, *, actor: str) -> None:
        """Turn a device away: its messages at once, its connection once the broker has the new files.

        Raises:
            UnknownDeviceError: There is none.
        """
        now = self._clock.now()
        with self._store.transaction():
            if not self._store.devices.revoke(name, now=now):
                raise UnknownDeviceError(f"there is no device {name!r}")
            self._store.certificates.revoke(name, now=now)
            self._store.audit.add(now, actor, "device revoked", {"device": name})
        self._write_crl()

    def renew(self, actor: str = "coordinator") -> int:
        """Send devices whose certificate ends soon a later one for the same key; returns how many."""
        broker, now = self._settings.broker, self._clock.now()
        if not (broker.tls and broker.ca_file is None):
            return 0
        due = self._store.certificates.to_renew(before=now + broker.renew_days * _DAY_S)
        for old in due:
            if self._store.devices.enrolment(old.device) is None:
                continue
            issued = self.authority.reissue(old.pem, days=broker.certificate_days, now=now)
            command = self._new_command(
                old.device, "renew-certificate", {"certificate": issued.certificate}, _RENEWAL_S, actor
            )
            with self._store.transaction():
                self._store.commands.add(command)
                self._store.certificates.add(
                    old.device,
                    serial=issued.serial,
                    pem=issued.certificate,
                    issued=now,
                    expires=issued.expires,
                    command=command.id,
                )
        return len(due)

    # ---- the broker

    def tls(self) -> Tls | None:
        """How the coordinator connects; its own certificate is made or renewed when that is due."""
        broker = self._settings.broker
        if not broker.tls:
            return None
        if broker.ca_file is not None:
            cert, key = broker.cert_file, broker.key_file
            return Tls(
                self._home / broker.ca_file,
                None if cert is None else self._home / cert,
                None if key is None else self._home / key,
            )
        authority = self.authority
        folder = authority.folder
        certificate, key_file = folder / "coordinator.pem", folder / "coordinator.key"
        days = broker.certificate_days
        if not certificate.exists() or self._clock.now() - certificate.stat().st_mtime > days * _DAY_S / 2:
            issued = authority.issue(coordinator_name(self._settings), days=days, now=self._clock.now())
            replace_file(key_file, issued.key.encode(), mode=0o600)
            replace_file(certificate, issued.certificate.encode())
        return Tls(folder / "ca.pem", certificate, key_file)

    def broker_files(self, folder: Path, *, hosts: Sequence[str] = (), days: float = 365.0) -> list[str]:
        """Write what the broker reads: access rules, passwords and, with TLS, certificates; returns the files' names.

        Args:
            folder: Where they go.
            hosts: Names and addresses of the broker, for a new certificate of its own; none: it keeps the one it has.
            days: How long that is good.

        Raises:
            StoreError: They cannot be written.
        """
        files: dict[str, bytes] = {
            "acl": self.acl().encode(),
            "passwords": password_file(self._store).encode(),
        }
        if self._settings.broker.tls and self._settings.broker.ca_file is None:
            authority = self.authority
            files["ca.pem"] = authority.ca_pem.encode()
            files["crl.pem"] = self._write_crl().read_bytes()
            if hosts:
                issued = authority.issue(hosts[0], days=days, now=self._clock.now(), hosts=hosts)
                files |= {"broker.pem": issued.certificate.encode(), "broker.key": issued.key.encode()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"cannot make {folder}") from error
        for name, data in files.items():
            replace_file(folder / name, data, mode=0o640)
        return list(files)

    def acl(self) -> str:
        """Access rules for mosquitto: every device publishes on its own topics only; who is revoked has none."""
        prefix = self._settings.prefix
        blocks = [f"user {coordinator_name(self._settings)}\ntopic readwrite {prefix}/#\n"]
        for name, group in self._store.devices.enrolled():
            # by name, not up/#: a broker keeps the last retained message of every topic that it lets somebody invent
            write = "".join(f"topic write {prefix}/d/{name}/up/{kind}\n" for kind in UP)
            blocks.append(
                f"user {name}\n{write}topic read {prefix}/d/{name}/dn/#\n"
                f"topic read {prefix}/g/{group}/desired\ntopic read {prefix}/tuf/+\ntopic read {prefix}/b/+/+\n"
            )
        return "\n".join(blocks)

    def _write_crl(self) -> Path:
        path = self._home / CA_FOLDER / "crl.pem"
        if self._settings.broker.tls and self._settings.broker.ca_file is None:
            now = self._clock.now()
            return self.authority.write_crl(self._store.certificates.revoked(now=now), now)
        return path

    # ---- commands

    def order(
        self, device: str, name: str, args: Mapping[str, Any] | None = None, *, expires_s: float, actor: str
    ) -> CommandRecord:
        """Tell a device what to do. It is sent as soon as the device can be reached, until it answers.

        Args:
            device: Who.
            name: One of `edge_sdk.commands.COMMANDS`.
            args: Of the command; texts may stand for numbers.
            expires_s: After this time it is not carried out any more.
            actor: Who asks, for the audit.

        Raises:
            ConfigError: There is no such command, or it does not take these.
            UnknownDeviceError: The device was not added here, or it was revoked.
            SigningError: The secret of commands is missing.
        """
        checked = _check(name, args or {}, expires_s)
        self._load_secret()  # what nobody could sign is refused now
        if self._store.devices.enrolment(device) is None:
            raise UnknownDeviceError(f"there is no device {device!r} with a command key: add it, or replace it")
        return self._give([device], name, checked, expires_s, actor)[0]

    def order_group(
        self, group: str, name: str, args: Mapping[str, Any] | None = None, *, expires_s: float, actor: str
    ) -> list[CommandRecord]:
        """Tell every device of a group that has a command key what to do: a command for each, as `order` makes it.

        Raises:
            ConfigError, UnknownDeviceError, SigningError: As `order`; also if the group has no such device. Nobody is
                told then.
        """
        checked = _check(name, args or {}, expires_s)
        self._load_secret()
        members = [device for device, of in self._store.devices.enrolled() if of == group]
        if not members:
            raise UnknownDeviceError(f"no device of group {group!r} has a command key: see edge-coordinator devices")
        return self._give(members, name, checked, expires_s, actor)

    def order_all(
        self, devices: Sequence[str], name: str, args: Mapping[str, Any], *, expires_s: float, actor: str
    ) -> list[CommandRecord]:
        """Tell these devices, which are enrolled, what to do: a command for each, as `order` makes it."""
        return self._give(devices, name, _check(name, args, expires_s), expires_s, actor)

    def _give(
        self, devices: Sequence[str], name: str, args: dict[str, Any], expires_s: float, actor: str
    ) -> list[CommandRecord]:
        made = [self._new_command(device, name, args, expires_s, actor) for device in devices]
        with self._store.transaction():
            for command in made:
                self._store.commands.add(command)
                detail = {"device": command.device, "command": name}
                self._store.audit.add(command.issued, actor, "command given", detail)
        return made

    def waiting(self) -> list[tuple[str, str]]:
        """(id, device) of commands that nobody has answered and that are still to be carried out, oldest first."""
        now = self._clock.now()
        if self._store.commands.to_give_up(now=now):
            with self._store.transaction():
                self._store.commands.give_up(now=now)
        return self._store.commands.waiting()

    def sign(self, record: CommandRecord) -> Command:
        """A command as it goes over the wire.

        Raises:
            UnknownDeviceError: The device was revoked meanwhile.
        """
        enrolment = self._store.devices.enrolment(record.device)
        if enrolment is None:
            raise UnknownDeviceError(f"there is no device {record.device!r} with a command key")
        order = Order(
            id=record.id,
            device=record.device,
            name=record.name,
            issued=record.issued,
            expires=record.expires,
            args=record.args,
        )
        return sign(order, self._key(record.device, enrolment))

    def _new_command(self, device: str, name: str, args: dict[str, Any], expires_s: float, actor: str) -> CommandRecord:
        now = self._clock.now()
        return CommandRecord(
            id=secrets.token_hex(8),
            device=device,
            name=name,
            args=args,
            issued=now,
            expires=now + expires_s,
            actor=actor,
            outcome="waiting",
            answered=None,
            reason="",
            result="",
        )

    def _key(self, device: str, enrolment: int) -> bytes:
        """A device's command key. Of the database alone nobody can give orders."""
        return hmac.new(self._load_secret(), f"{enrolment}/{device}".encode(), hashlib.sha256).digest()

    def _load_secret(self) -> bytes:
        if self._secret is None:
            self._secret = self._read_secret()
        return self._secret

    def _read_secret(self) -> bytes:
        path = self._home / SECRET_NAME
        try:
            was_there = self._store.secrets.exists(SECRET_NAME)
            if not path.exists():
                self._require_new("commands", was_there=was_there)
                temporary = path.with_name(f"{SECRET_NAME}.{os.getpid()}")
                replace_file(temporary, os.urandom(KEY_BYTES).hex().encode(), mode=0o600)
                try:
                    os.link(temporary, path)  # whoever comes first makes it, for all
                except FileExistsError:
                    pass
                finally:
                    temporary.unlink()
            secret = bytes.fromhex(path.read_text("ascii"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        self._trust("commands", secret)
        return secret

    def _text(self, name: str) -> str:
        try:
            return (self._home / name).read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"broker.ca_file {name!r} cannot be read: {error}") from error


def _check(name: str, args: Mapping[str, Any], expires_s: float) -> dict[str, Any]:
    """The arguments of a command as they are sent."""
    if not expires_s > 0:
        raise ConfigError(f"a command must expire in more than 0 s, got {expires_s}")
    try:
        checked: dict[str, Any] = msgspec.to_builtins(check_order(name, args, strict=False))
    except ProtocolError as error:
        raise ConfigError(str(error)) from error
    return checked
