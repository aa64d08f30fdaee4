"""How far the devices of a group are trusted: said once for all of them, those that join later included."""

from __future__ import annotations

import msgspec

from edge_sdk.clock import Clock
from edge_server.identity import Identities
from edge_server.store import Store

_EXPIRES_S = 86_400.0


class Modes:
    """Keeps the devices of a group in the group's mode.

    Args:
        store: The coordinator's database.
        identities: Give the commands.
        clock: Where the time comes from.
    """

    def __init__(self, store: Store, identities: Identities, *, clock: Clock) -> None:
        self._store, self._identities, self._clock = store, identities, clock

    def set(self, group: str, mode: str, *, actor: str) -> int:
        """Say how far a group's devices are trusted, those of today and those that join later.

        Args:
            group: Whose devices.
            mode: monitor, shadow or adapt; "": no longer say anything, and let each keep what it was told.
            actor: Who asks, for the audit.

        Returns:
            How many devices are told now; the others are when they are heard again.
        """
        with self._store.transaction():
            record = self._store.groups.get(group)
            self._store.groups.save(msgspec.structs.replace(record, mode=mode))
            self._store.audit.add(self._clock.now(), actor, "group mode set", {"group": group, "mode": mode})
        return self.keep()

    def keep(self) -> int:
        """Tell the mode of its group to every device that is online in another; returns how many were told.

        A device that is away is told when it is back: a command would have expired by then. One that does not follow
        is told again after a day.
        """
        by_mode: dict[str, list[str]] = {}
        for device, mode in self._store.devices.in_other_modes(not_told_since=self._clock.now() - _EXPIRES_S):
            by_mode.setdefault(mode, []).append(device)
        for mode, devices in by_mode.items():
            self._identities.order_all(devices, "mode", {"mode": mode}, expires_s=_EXPIRES_S, actor="coordinator")
        return sum(map(len, by_mode.values()))
