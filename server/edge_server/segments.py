"""Segments: devices that are called by one name, by a label query that is kept under it.

In a query `@name` stands for the segment's own. Whatever keeps a query (a rollout, another segment) keeps it spelled
out, so that nobody is moved in or out of it when a segment of that name is made anew.
"""

from __future__ import annotations

from edge_sdk.clock import Clock
from edge_sdk.errors import ConfigError
from edge_server.errors import SegmentError, UnknownSegmentError
from edge_server.labels import is_segment_name, parse
from edge_server.records import SegmentDetail, SegmentRecord
from edge_server.store import Store


class Segments:
    """Makes, shows and deletes segments.

    Args:
        store: The coordinator's database.
        clock: Where the time comes from.
    """

    def __init__(self, store: Store, *, clock: Clock) -> None:
        self._store, self._clock = store, clock

    def create(self, name: str, query: str, *, actor: str) -> SegmentDetail:
        """Keep a label query under a name.

        Args:
            name: Letters, digits, `_`, `.` and `-`, a letter first.
            query: See `labels`; segments that it names are spelled out.
            actor: Who asks, for the audit.

        Raises:
            ConfigError: It cannot be a name, or is no query.
            SegmentError: There is a segment of that name.
        """
        if not is_segment_name(name):
            raise ConfigError(
                f"{name[:64]!r} cannot name a segment: use letters, digits, '_', '.', '-', a letter first, at most 63"
            )
        with self._store.transaction():
            query = self._store.segments.spell_out(query).strip()
            parse(query)
            now = self._clock.now()
            if not self._store.segments.add(SegmentRecord(name=name, query=query, created=now, actor=actor)):
                raise SegmentError(f"there is a segment {name!r} already: delete it first, or choose another name")
            self._store.audit.add(now, actor, "segment created", {"segment": name, "query": query})
        return self.show(name)

    def all(self) -> list[SegmentDetail]:
        """Every segment, by name."""
        return [self._detail(segment) for segment in self._store.segments.all()]

    def show(self, name: str) -> SegmentDetail:
        """The segment of that name.

        Raises:
            UnknownSegmentError: There is none.
        """
        found = next((segment for segment in self._store.segments.all() if segment.name == name), None)
        if found is None:
            raise UnknownSegmentError(f"there is no segment {name[:64]!r}")
        return self._detail(found)

    def delete(self, name: str, *, actor: str) -> None:
        """Forget a segment.

        Raises:
            UnknownSegmentError: There is none of that name.
            SegmentError: A rollout that is not over was started for it.
        """
        with self._store.transaction():
            if rollouts := self.show(name).rollouts:
                numbers = ", ".join(map(str, rollouts))
                raise SegmentError(f"segment {name!r} is in use by rollout {numbers}: wait for its end, or abort it")
            self._store.segments.delete(name)
            self._store.audit.add(self._clock.now(), actor, "segment deleted", {"segment": name})

    def _detail(self, segment: SegmentRecord) -> SegmentDetail:
        active = self._store.rollouts.find(active=True)
        return SegmentDetail(
            name=segment.name, query=segment.query, created=segment.created, actor=segment.actor,
            devices=len(self._store.labels.matching(parse(segment.query))),
            rollouts=sorted(rollout.id for rollout in active if segment.name in rollout.plan.segments),
        )  # fmt: skip
