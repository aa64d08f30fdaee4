"""Which predictions the app is asked to label, and what became of it: a daily budget, kept across restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from edge_sdk.ask import LabelRequest, Requests, choose_requests, uncertainty
from edge_sdk.config import DeviceConfig
from edge_sdk.experience import Experience
from edge_sdk.head import Head, dequantize
from edge_sdk.manifest import Manifest
from edge_sdk.store import Store, stack
from edge_sdk.tasks import as_scores

_STATE = "requests"
_CANDIDATES = 2_000
_KNOWN = 1_000


class Asking:
    """Owns the open requests.

    Args:
        store: The device's database.
        config: Budget and expiry.
        emit: Records an event inside the current transaction of the store.
    """

    def __init__(self, store: Store, config: DeviceConfig, emit: Callable[[str, dict[str, Any]], None]) -> None:
        self._store, self._config, self._emit = store, config.feedback, emit
        saved = store.get(_STATE)
        self._requests = msgspec.json.decode(saved, type=Requests) if saved else Requests()

    def ask(
        self, count: int, now: float, *, experience: Experience, head: Head, manifest: Manifest
    ) -> list[LabelRequest]:
        """Ask for the labels that are worth most, as many as the day's budget has left.

        Args:
            count: Most of them.
            now: Seconds since the epoch.
            experience: What is labelled already.
            head: Says how sure the model is now.
            manifest: Of the release in use.
        """
        left = min(count, self._requests.left(now, self._config))
        before = {request.id for request in self._requests.asked}  # also those that nobody answered in time
        rows = self._store.waiting_rows(manifest.trunk_id, limit=_CANDIDATES + len(before))
        rows = [row for row in rows if row.id not in before]
        if left <= 0 or not rows:
            return []
        latents = stack([row.latent for row in rows], manifest.latent.dim)
        scores = as_scores(head.logits(dequantize(latents, manifest.latent)), manifest)
        chosen = choose_requests(
            latents,
            scores,
            [row.id for row in rows],
            np.array([row.time for row in rows]),
            experience.known_latents(_KNOWN),
            task=manifest.task,
            count=left,
        )
        doubt = uncertainty(scores, manifest.task)
        asked = self._requests.ask([rows[i].id for i in chosen], now, self._config)
        with self._store.transaction():
            self._write(asked)
        self._requests = asked
        expires = now + self._config.request_ttl_s
        return [LabelRequest(rows[i].id, rows[i].predicted, float(doubt[i]), expires) for i in chosen]

    def turn(self, now: float, answered: list[str]) -> None:
        """Take note of labels that came, and of requests whose time is up."""
        requests, late = self._requests.answered(answered).expire(now, self._config)
        if requests == self._requests:
            return
        with self._store.transaction():
            if late:
                self._emit("requests_expired", {"count": len(late)})
            self._write(requests)
        self._requests = requests

    @property
    def waiting_ids(self) -> frozenset[str]:
        """Predictions whose labels are asked for and not given yet."""
        return frozenset(request.id for request in self._requests.asked if request.waiting)

    @property
    def waiting(self) -> int:
        """How many labels are asked for and not given yet."""
        return len(self.waiting_ids)

    def forget(self, ids: set[str]) -> None:
        """Nothing is asked about these any longer; inside a transaction."""
        kept = [request for request in self._requests.asked if request.id not in ids]
        if len(kept) != len(self._requests.asked):
            self._requests = Requests(kept)
            self._write(self._requests)

    def _write(self, requests: Requests) -> None:
        self._store.put(_STATE, msgspec.json.encode(requests))
