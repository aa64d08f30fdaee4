"""Orders from the coordinator to one device: who may give them, what they may say, and that each is carried out once.

A command is an `Order` and its HMAC-SHA256 under a key that only this device and the coordinator have (ADR 19). The
device remembers every order before it carries it out, so that neither a repetition nor a crash makes it act twice, and
tells the outcome as the event `command_done`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from edge_sdk.errors import EdgeError, ProtocolError
from edge_sdk.messages import Command, Order, decode, unpack
from edge_sdk.types import Mode

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_DOMAIN = b"edge-command-1\0"
_STATE = "commands"
_REMEMBERED = 256
_MAX_TEXT = 256
_MAX_RESULT_BYTES = 8_000


class NoArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The command takes none."""


class PauseArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For how long."""

    seconds: Annotated[float, Meta(ge=0)] = 0.0
    """0: until `resume-learning`."""


class IntervalArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often."""

    seconds: Annotated[float, Meta(ge=0, le=31 * 86_400)]
    """0: as configured."""


class ModeArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the device is trusted."""

    mode: Mode


class CertificateArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate of the key that the device has."""

    certificate: Annotated[str, Meta(max_length=16_384)]


COMMANDS: dict[str, type[msgspec.Struct]] = {
    "adapt-now": NoArgs,
    "roll-back": NoArgs,
    "reset-to-base": NoArgs,
    "pause-learning": PauseArgs,
    "resume-learning": NoArgs,
    "report-interval": IntervalArgs,
    "mode": ModeArgs,
    "status": NoArgs,
    "diagnostics": NoArgs,
    "renew-certificate": CertificateArgs,
}
"""What can be ordered, and with which arguments."""

Handlers = Mapping[str, Callable[[Any], Mapping[str, Any] | None]]
"""By name of the command: takes its arguments, returns what is to be told of the outcome beside that it is done."""


class KeyValue(Protocol):
    """What the desk needs of the device's database."""

    def get(self, key: str) -> bytes | None:
        """The value under `key`."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Set the value under `key`."""
        ...

    def transaction(self) -> AbstractContextManager[Any]:
        """All of it or nothing."""
        ...


def check_order(name: str, args: Mapping[str, Any], *, strict: bool = True) -> msgspec.Struct:
    """The arguments of a command.

    Args:
        name: Of the command.
        args: As they came.
        strict: False: texts may stand for numbers, as on a command line.

    Raises:
        ProtocolError: There is no such command, or it does not take these.
    """
    if name not in COMMANDS:
        raise ProtocolError(f"there is no command {name[:_MAX_TEXT]!r}: choose one of {', '.join(COMMANDS)}")
    try:
        return msgspec.convert(dict(args), COMMANDS[name], strict=strict)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{name}: {error}") from error


def sign(order: Order, key: bytes) -> Command:
    """The command that carries an order, under the key of its device."""
    body = msgspec.msgpack.encode(order)
    return Command(body, _mac(body, key))


def verify(payload: bytes, key: bytes, *, device: str) -> Order:
    """The order in a message.

    Raises:
        ProtocolError: It is none, was not signed with this key, or is for another device; or the key is empty.
    """
    if not key:
        raise ProtocolError("this device was enrolled without a key for commands")
    command = decode(payload, Command)
    if not hmac.compare_digest(command.mac, _mac(command.order, key)):
        raise ProtocolError("a command that was not signed with this device's key")
    order = unpack(command.order, Order)
    if order.device != device:
        raise ProtocolError("a command for another device")
    return order


def _mac(body: bytes, key: bytes) -> bytes:
    return hmac.new(key, _DOMAIN + body, hashlib.sha256).digest()


class _Seen(msgspec.Struct):
    id: str
    name: str
    issued: float
    done: bool = False


class _Memory(msgspec.Struct):
    orders: list[_Seen] = []
    floor: float = 0.0
    """Orders issued up to then may have been forgotten: none of them is taken any more."""


class Desk:
    """Takes commands, each once.

    Args:
        store: Of the device.
        device: Its name.
        key: Its command key in hexadecimal digits; empty: it takes no commands.
        emit: Records an event, inside a transaction.
    """

    def __init__(self, store: KeyValue, *, device: str, key: str, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._store, self._device, self._emit = store, device, emit
        self._key = bytes.fromhex(key)
        saved = store.get(_STATE)
        self._memory = msgspec.json.decode(saved, type=_Memory) if saved else _Memory()

    @property
    def unfinished(self) -> bool:
        """Whether an order was begun of which nothing was told."""
        return any(not order.done for order in self._memory.orders)

    def turn(self, payloads: Iterable[bytes], now: float, handlers: Handlers) -> int:
        """Carry out what came; returns how many messages were no command for this device.

        Raises:
            StoreError: An order could not be remembered; it was not carried out, and will come again.
        """
        for begun in [seen for seen in self._memory.orders if not seen.done]:
            self._finish(begun, "interrupted", "the device stopped while it carried this out", {})
        refused = 0
        for payload in payloads:
            try:
                order = verify(payload, self._key, device=self._device)
            except ProtocolError as error:
                logger.warning("%s: a command was refused: %s", self._device, error)
                refused += 1
                continue
            self._take(order, now, handlers)
        return refused

    def _take(self, order: Order, now: float, handlers: Handlers) -> None:
        if any(seen.id == order.id for seen in self._memory.orders):
            return  # a repetition; its outcome is on its way
        entry = _Seen(order.id, order.name, order.issued)
        with self._store.transaction():
            memory = self._write([*self._memory.orders, entry])
        floor, self._memory = self._memory.floor, memory
        if now >= order.expires or order.issued <= floor:
            self._finish(entry, "expired", f"it came {max(0.0, now - order.expires):.0f} s late", {})
            return
        logger.info("%s: carrying out %s", self._device, order.name)
        outcome, reason, result = "done", "", {}
        try:
            args = check_order(order.name, order.args)
            result = dict(handlers[order.name](args) or {})
        except EdgeError as error:
            outcome, reason = "failed", str(error)[:_MAX_TEXT]
        except Exception as error:  # a bug in one command must not come again with every start
            logger.exception("%s: %s failed", self._device, order.name)
            outcome, reason = "failed", type(error).__name__
        self._finish(entry, outcome, reason, result)

    def _finish(self, entry: _Seen, outcome: str, reason: str, result: Mapping[str, Any]) -> None:
        text = msgspec.json.encode(result).decode() if result else ""
        with self._store.transaction():
            orders = [_Seen(o.id, o.name, o.issued, o.done or o.id == entry.id) for o in self._memory.orders]
            self._emit(
                "command_done",
                {
                    "id": entry.id,
                    "command": entry.name,
                    "outcome": outcome,
                    "reason": reason,
                    "result": text if len(text) <= _MAX_RESULT_BYTES else "",
                },
            )
            memory = self._write(orders)
        self._memory = memory

    def _write(self, orders: list[_Seen]) -> _Memory:
        """Store what is to be remembered; it is in force once the transaction is through."""
        forgotten = orders[:-_REMEMBERED]
        floor = max([self._memory.floor, *(order.issued for order in forgotten)])
        memory = _Memory(orders[-_REMEMBERED:], floor)
        self._store.put(_STATE, msgspec.json.encode(memory))
        return memory
