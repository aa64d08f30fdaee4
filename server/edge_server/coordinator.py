"""The coordinator: the fleet's records, and the connection through which they come in and orders go out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edge_sdk.clock import Clock, is_due
from edge_sdk.desired import sign_desired
from edge_sdk.errors import NotConnectedError, ProtocolError, StoreError
from edge_sdk.messages import Desired, Topics, decode, encode
from edge_sdk.transport import Message, Transport
from edge_server.alert_sources import Now
from edge_server.errors import SigningError, UnknownDeviceError
from edge_server.ingest import Turn
from edge_server.monitoring import Pulse
from edge_server.plan import RolloutRules
from edge_server.records import DeviceRecord, EventRecord, GroupRecord, RolloutRecord
from edge_server.registry import Registry
from edge_server.releases import BlockServer
from edge_server.retention import tend
from edge_server.settings import Settings
from edge_server.sinks import Courier, open_sinks

logger = logging.getLogger(__name__)
BATCH_ROWS = 1000
"""Most messages committed together: more cost as much each, and hold up whoever else writes."""
RECEIVE_MAXIMUM = 2 * BATCH_ROWS
"""Most messages that the broker sends ahead: one batch is committed while the next arrives. The rest waits there."""
_COMMAND_AGAIN_S = 60.0
_CERTIFICATES_S = 3600.0
_RENEW_S = 60.0
_TEND_S = 10.0
_LAG_DEVICES = 3
"""Of fewer, one whose clock is slow would look like a coordinator that is."""


class Coordinator:
    """Takes in what devices send, hands out releases, and moves rollouts on.

    One turn at a time, on one thread at a time.

    Args:
        home: Its folder, with database and releases; made if it is missing.
        transport: The connection to the broker.
        clock: Where the time comes from.
        settings: As read from `coordinator.toml`; None: the defaults.

    Example:
        >>> coordinator = Coordinator(home, transport=transport)  # doctest: +SKIP
        >>> coordinator.start()  # doctest: +SKIP
        >>> coordinator.push(Path("checkpoint"))  # doctest: +SKIP
        >>> while running:  # doctest: +SKIP
        ...     coordinator.step()
    """

    def __init__(
        self,
        home: Path,
        *,
        transport: Transport,
        clock: Clock | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.registry = Registry(home, settings=settings, clock=clock)
        self._settings, self._clock = self.registry.settings, self.registry.clock
        self._transport = transport
        self._topics = Topics(self._settings.prefix)
        self._blocks = BlockServer(
            self.registry.blobs,
            self._topics,
            max_queued=self._settings.max_queued_blocks,
            repeat_s=self._settings.repeat_blocks_s,
        )
        self._published: dict[str, tuple[int, tuple[int, int]]] = {}
        self._published_on = 0
        self._certified_at: float | None = None
        self._commanded: dict[str, dict[str, float]] = {}
        self._advanced_at: float | None = None
        self._renewed_at: float | None = None
        self._tended_at: float | None = None
        self._problem = ""
        self._metadata: dict[str, bytes] = {}
        self._metadata_stamp: tuple[int, int] | None = None
        self._unsigned = self._unstored = ""
        self._looked_at: float | None = None
        self._lag_s: float | None = None
        self._behind_s = 0.0
        self._unsigned = ""
        alerts = self._settings.alerts
        sinks = open_sinks(alerts.sinks, home=home, transport=transport, topics=self._topics, clock=self._clock)
        self._courier = Courier(self.registry.store, sinks, clock=self._clock, give_up_s=alerts.give_up_s)

    def start(self) -> None:
        """Connect and subscribe. What groups should run is published as soon as the connection is there."""
        # who went away meanwhile said so to the broker, which repeats it now; a broker that forgot says nothing
        self.registry.forget_presence()
        # subscribed first, so that the connection counts only once nothing can be missed on it
        self._transport.subscribe(f"{self._topics.prefix}/d/+/up/#")
        self._transport.connect()
        self.registry.shipping.tell_again()
        self._publish_desired()

    def close(self) -> None:
        """Disconnect and close the database."""
        self._courier.close()
        self._transport.close()
        self.registry.close()

    def step(self) -> int:
        """One turn: `pump`, and `advance` when it is due. Returns what `pump` does; errors as there."""
        handled = self.pump()
        now = self._clock.now()
        if self._renewed_at is None or abs(now - self._renewed_at) >= _RENEW_S:
            self._renewed_at = now
            self.renew()
        if self._advanced_at is None or now - self._advanced_at >= self._settings.rollout_interval_s:
            self._advanced_at = now
            self.advance()
        self.watch()
        due = self._tended_at is None or abs(now - self._tended_at) >= _TEND_S
        if due and not tend(self.registry.store, self._settings.retention, now):
            self._tended_at = now
        if self._certified_at is None or abs(now - self._certified_at) >= _CERTIFICATES_S:
            self._certified_at = now
            if renewed := self.registry.identities.renew():
                logger.info("%d certificates are being renewed", renewed)
            self.registry.identities.tls()  # the coordinator's own, which the transport reads again
        return handled

    def pump(self) -> int:
        """Take in what has arrived, acknowledge it once it is committed, send blocks. Never moves a rollout.

        Returns:
            How many messages were taken in and blocks sent; 0 when there was nothing to do.

        Raises:
            StoreError: Nothing of this turn was stored or acknowledged; the devices send it again.
        """
        messages = self._transport.receive()
        told = [message for message in messages if not self._courier.hear(message.topic, message.payload)]
        for batch in range(0, len(told), BATCH_ROWS):
            self._ingest(told[batch : batch + BATCH_ROWS])
        self._send_commands()
        sent = self._blocks.serve(self._transport, self._settings.blocks_per_turn, self._clock.now())
        self._publish_desired()
        return len(messages) + sent

    def advance(self) -> None:
        """Give every active rollout one turn, and publish what changed by it.

        Raises:
            StoreError: Nothing changed.
        """
        for rollout in self.registry.advance():
            plan, state = rollout.plan, rollout.state
            level = logging.WARNING if state.status in ("rolling_back", "rolled_back") else logging.INFO
            logger.log(level, "rollout %s of release %s: %s, %s", rollout.id, plan.release, state.status, state.reason)
        if told := self.registry.modes.keep():
            logger.info("%d devices are told the mode of their group", told)
        self._publish_desired()

    def watch(self) -> None:
        """Look at the fleet as a whole, when it is due: the windows of the drift test, alerts, and their delivery.

        Raises:
            StoreError: What could not be stored is done the next time.
        """
        self.registry.insight.turn()
        now = self._clock.now()
        if self._looked_at is None or abs(now - self._looked_at) >= self._settings.alerts.interval_s:
            self._looked_at = now
            self.registry.alerts.look(Now(lag_s=self._lag_s or 0.0, problem=self._problem))
            self._lag_s = None
        self._courier.turn()

    def renew(self) -> None:
        """Sign anew what is near its end, so that devices go on believing it."""
        if not self.registry.repository.exists:
            return
        problem = ""
        try:
            if self.registry.repository.renew():
                logger.info("signed metadata renewed")
                self._publish_desired()
        except SigningError as error:
            problem = str(error)
        if problem and problem != self._problem:  # a person has to act, and everything else goes on
            logger.error("devices will soon install nothing any more: %s", problem)
        self._problem = problem

    def push(self, folder: Path, *, group: str = "default", plan: RolloutRules | None = None) -> int:
        """Take in a checkpoint, start its rollout and publish it; returns the rollout's number.

        See `Registry.push` for arguments and errors.
        """
        rollout = self.registry.push(folder, group=group, plan=plan, actor="library")
        self._publish_desired()
        return rollout

    def abort(self, rollout: int, *, reason: str = "") -> None:
        """Withdraw a release that is on its way. See `Registry.abort`."""
        self.registry.abort(rollout, reason=reason, actor="library")
        self._publish_desired()

    def desired_revision(self, group: str = "default") -> int:
        """Number of what the group is told to run; 0 before its first release."""
        return self.registry.store.groups.get(group).revision

    @property
    def pulse(self) -> Pulse:
        """How it goes; may be asked from another thread."""
        return Pulse(connected=self._transport.connected, lag_s=self._behind_s, unstored=self._unstored)

    def note_stored(self, problem: str = "") -> None:
        """Say how storing what devices send goes, when that changes: it is tried in every turn."""
        if problem == self._unstored:
            return
        if problem:
            logger.error("what devices send cannot be stored, they keep it and send it again: %s", problem)
        else:
            logger.info("what devices send is stored again")
        self._unstored = problem

    def devices(self) -> list[DeviceRecord]:
        """Every device, by name."""
        return self.registry.devices()

    def rollouts(self) -> list[RolloutRecord]:
        """Every rollout, newest first."""
        return self.registry.rollouts()

    def events(
        self,
        *,
        device: str | None = None,
        name: str | None = None,
        before: int | None = None,
        limit: int = 1000,
    ) -> list[EventRecord]:
        """Events with a number below `before`, newest first."""
        return self.registry.events(device=device, name=name, before=before, limit=limit)

    def _ingest(self, messages: list[Message]) -> None:
        store = self.registry.store
        parsed = [self._topics.parse_up(message.topic) for message in messages]
        devices = {entry[0] for entry in parsed if entry is not None}
        with store.transaction():
            known = store.ingest.load(devices)
            turn = Turn(
                topics=self._topics,
                positions=known.positions,
                known=known.devices,
                accept_unknown=self._settings.accept_unknown,
                now=self._clock.now(),
                revoked=known.revoked,
            )
            for message in messages:
                turn.read(message)
            store.ingest.write(turn)
        store.ingest.committed(turn)
        if turn.latest:
            self._behind_s = max(0.0, turn.now - max(row.time for row in turn.latest.values()))
        if len(turn.latest) >= _LAG_DEVICES:
            lag_s = turn.now - max(row.time for row in turn.latest.values())
            self._lag_s = lag_s if self._lag_s is None else min(lag_s, self._lag_s)
        if turn.last_problem or turn.unknown:
            logger.warning(
                "%s messages not understood or of unknown devices; last: %s",
                sum(turn.counters[name] for name in ("malformed", "rejected_body", "unknown_device", "revoked_device")),
                turn.last_problem or f"unknown device {next(iter(turn.unknown))}",
            )
        for device, state in turn.states.items():
            if state.online:
                self._commanded.pop(device, None)  # whatever it was sent before, it may not have been there
        try:
            for device, ack in turn.acks:
                # one that is lost is said again when the device sends again
                self._transport.publish(self._topics.down(device, "ack"), encode(ack), qos=0)
        except NotConnectedError:
            logger.debug("acknowledgements not sent: the devices will send again and be answered then")
        for need in turn.needs:
            self._blocks.ask(need, self._clock.now())

    def _send_commands(self) -> None:
        """Publish commands that wait: new ones at once, the others again when the device is back or does not answer."""
        if not self._transport.connected:
            return
        now = self._clock.now()
        sent: dict[str, dict[str, float]] = {}
        for number, device in self.registry.identities.waiting():
            known = self._commanded.get(device, {})
            sent.setdefault(device, {})[number] = known.get(number, now)
            if number in known and not is_due(now, known[number], _COMMAND_AGAIN_S):
                continue
            command = self.registry.store.commands.find(number=number)[0]
            try:
                payload = encode(self.registry.identities.sign(command))
                topic = self._topics.down(device, "cmd")
                self._transport.publish(topic, payload, expires_s=command.expires - now)
            except UnknownDeviceError:  # revoked a moment ago
                continue
            except NotConnectedError:
                del sent[device][number]
                break
            except SigningError as error:
                del sent[device][number]
                if self._unsigned != str(error):  # once: they are tried in every turn
                    self._unsigned = str(error)
                    logger.error("no command can be given: %s", error)  # noqa: TRY400
                break
            sent[device][number] = now
        self._commanded = sent

    def _publish_desired(self) -> None:
        """Publish what changed, here or in another process; everything again after a new connection.

        With keys it is signed, and signed anew whenever the metadata is: it is good as long as the timestamp.
        """
        if self._published_on != self._transport.connections:
            self._published.clear()
            self._metadata.clear()
            self._metadata_stamp = None
            self._published_on = self._transport.connections
        if not self._transport.connected or not self._publish_metadata():
            return
        stamp = self.registry.repository.stamp
        due = [
            group
            for group in self.registry.store.groups.all()
            if self._published.get(group.name) != (group.revision, stamp)
        ]
        if not due or (sign := self._signing()) is None:
            return
        for group in due:
            try:
                self._transport.publish(self._topics.desired(group.name), sign(group), retain=True)
            except NotConnectedError:
                return
            self._published[group.name] = (group.revision, stamp)

    def _signing(self) -> Callable[[GroupRecord], bytes] | None:
        """What makes a payload of what a group is told; None: it should be signed, and cannot be."""
        repository, now = self.registry.repository, self._clock.now()
        if not repository.exists:
            return lambda group: group.desired
        problem = ""
        try:
            voucher = repository.voucher()
        except (SigningError, StoreError) as error:
            problem = str(error)
        if problem and problem != self._unsigned:
            logger.error("groups are told nothing new: %s", problem)
        self._unsigned = problem
        if problem:
            return None

        def signed(group: GroupRecord) -> bytes:
            if not group.desired:
                return b""  # nothing was ever said to it: what another coordinator left there is cleared
            message = decode(group.desired, Desired)
            return sign_desired(message, voucher.sign, prefix=self._topics.prefix, group=group.name, issued=now,
                                expires=voucher.expires)  # fmt: skip

        return signed

    def _publish_metadata(self) -> bool:
        """Publish signed metadata that is not out yet, before what refers to it; False: not now."""
        repository = self.registry.repository
        stamp = repository.stamp
        if stamp == self._metadata_stamp or not repository.exists:
            return True
        try:
            published = repository.published()
            for name, data in (*published.files.items(), ("set", encode(published.versions))):
                if self._metadata.get(name) != data:
                    self._transport.publish(self._topics.metadata(name), data, retain=True)
                    self._metadata[name] = data
        except NotConnectedError:
            return False
        except (SigningError, StoreError, ProtocolError) as error:
            logger.error("signed metadata cannot be published: %s", error)  # noqa: TRY400
        self._metadata_stamp = stamp
        return True
