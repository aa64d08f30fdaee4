"""What is worth an alert, and who is told."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from edge_server.alerts import Severity


class SinkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where notices go.

    Attributes:
        kind: "log"; "mqtt": the topic PREFIX/alerts/NAME; "webhook": a POST to `url`.
        min_severity: Less is not sent.
        url: Of the webhook: https://..., or http:// within a network that you trust.
        secret_file: Holds the secret that the webhook's bodies are signed with, relative to the home folder.
        timeout_s: For one delivery to the webhook, all in all.
    """

    kind: Literal["log", "mqtt", "webhook"]
    min_severity: Severity = "warning"
    url: str = ""
    secret_file: str = ""
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 10.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if self.kind != "webhook":
            if self.url or self.secret_file:
                raise ValueError(f"a sink of kind {self.kind} has no url and no secret_file")
        elif parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a webhook needs an url such as https://example.org/hook, got {self.url!r}")
        elif not self.secret_file:
            raise ValueError("a webhook needs a secret_file: whoever receives its notices must know whose they are")


class AlertSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When people are told.

    Attributes:
        interval_s: Time between two looks.
        offline_s: A device not heard of for longer is offline for too long.
        hold_s: What happened once, such as a failed update, is an alert for so long, or until the device tells better.
        paused_s: A rollout that a person paused for longer is an alert; one that waits for approval is at once.
        accuracy_floor: Accuracy of a device below which is an alert, 0 to 1; 0: none.
        max_rss_mb: Memory of a device's process above which is an alert; 0: none.
        min_disk_mb: Room on the coordinator's disk below which is an alert.
        min_device_disk_mb: Room on a device's disk below which is an alert; 0: none.
        certificate_days: A certificate that ends sooner, and has not been renewed, is an alert.
        root_days: So before its end the signed root is an alert.
        behind_s: The coordinator falls behind when the newest rows it takes in are older.
        clock_ahead_s: A device's clock that is further ahead is an alert.
        keep_days: So long resolved alerts and what was delivered are kept.
        give_up_s: What could not be delivered for so long is given up.
        sinks: By name.
    """

    interval_s: Annotated[float, Meta(gt=0)] = 60.0
    offline_s: Annotated[float, Meta(gt=0)] = 86_400.0
    hold_s: Annotated[float, Meta(gt=0)] = 86_400.0
    paused_s: Annotated[float, Meta(gt=0)] = 86_400.0
    accuracy_floor: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_rss_mb: Annotated[float, Meta(ge=0)] = 0.0
    min_disk_mb: Annotated[float, Meta(ge=0)] = 500.0
    min_device_disk_mb: Annotated[float, Meta(ge=0)] = 100.0
    certificate_days: Annotated[float, Meta(ge=0)] = 14.0
    root_days: Annotated[float, Meta(ge=0)] = 60.0
    behind_s: Annotated[float, Meta(gt=0)] = 60.0
    clock_ahead_s: Annotated[float, Meta(gt=0)] = 300.0
    keep_days: Annotated[float, Meta(gt=0)] = 90.0
    give_up_s: Annotated[float, Meta(gt=0)] = 3 * 86_400.0
    sinks: dict[Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")], SinkSettings] = msgspec.field(
        default_factory=lambda: {"log": SinkSettings(kind="log", min_severity="info")}
    )
