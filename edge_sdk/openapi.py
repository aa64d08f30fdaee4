"""What `edge serve` takes and gives, and the OpenAPI document made from the same structs."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from edge_sdk import __version__
from edge_sdk.ask import LabelRequest
from edge_sdk.errors import ShapeError
from edge_sdk.skew import Skew, findings
from edge_sdk.status import Status
from edge_sdk.store import Lineage
from edge_sdk.types import AnyArray, Prediction

Id = Annotated[str, Meta(min_length=1, max_length=128)]
Label = Annotated[str, Meta(min_length=1, max_length=256)]
MAX_NAME_CHARS = 64
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
"""Of a slice or a source; empty: none."""
MAX_LINEAGE = 500
"""Heads that a device remembers the making of."""

DTYPES = ("float32", "uint8", "int32", "int64")
"""Of a binary body, little-endian."""


class PredictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sample as `x`, or several as `rows`."""

    x: list[Any] | dict[str, Any] | UnsetType = UNSET
    """Numbers, nested as the input's shape; or an object of columns, or of the model's inputs by name."""
    rows: list[Any] | UnsetType = UNSET
    """Samples, each as `x`."""
    id: Id | None = None
    """The app's own name for the prediction of `x`."""
    state: dict[str, Any] | None = None
    """Of a recurrent model: what its last answer gave."""
    slice: Name = ""
    """The app's own name for the part of the world that it comes from; no challenger may harm one."""

    def __post_init__(self) -> None:
        if (self.x is UNSET) == (self.rows is UNSET):
            raise ValueError("give either x (one sample) or rows (several)")
        if self.rows is not UNSET and (self.id is not None or self.state is not None):
            raise ValueError("id and state go with x, not with rows")


class PredictReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the model said about one sample. Fields that its task does not have are left out."""

    id: str
    release: int
    head: int
    latency_ms: float
    label: str | UnsetType = UNSET
    """Classification and multilabel: the most probable label."""
    probabilities: dict[str, float] | UnsetType = UNSET
    """By label."""
    present: list[str] | UnsetType = UNSET
    """Labels whose probability reached their threshold."""
    values: dict[str, float | None] | UnsetType = UNSET
    """Regression: by target, in its unit."""
    outputs: dict[str, Any] | UnsetType = UNSET
    """Raw models: by output, numbers nested as its shape; null stands for NaN and infinity."""
    state: dict[str, Any] | UnsetType = UNSET
    """Recurrent models: give it to the next request."""
    holdout: bool = False
    """True: act as if there were no prediction; its label is then free of the model's influence."""

    @classmethod
    def of(cls, prediction: Prediction) -> PredictReply:
        """The reply that tells a prediction."""
        labelled = prediction.probabilities.size > 0
        return cls(
            id=prediction.id,
            release=prediction.release,
            head=prediction.head,
            latency_ms=prediction.latency_ms,
            label=prediction.label if labelled else UNSET,
            probabilities=_by_name(prediction.labels, prediction.probabilities) if labelled else UNSET,
            present=list(prediction.present) if labelled else UNSET,
            values=_by_name(prediction.labels, prediction.values) if prediction.values.size else UNSET,
            outputs={name: value.tolist() for name, value in prediction.outputs.items()} or UNSET,
            state={name: value.tolist() for name, value in prediction.state.items()} or UNSET,
            holdout=prediction.holdout,
        )


class BatchReply(msgspec.Struct, frozen=True):
    """One prediction for each row, in their order."""

    predictions: list[PredictReply]


class ObserveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The truth about a prediction: `label`, or `truth` where it is not one label."""

    id: Id
    label: Label | UnsetType = UNSET
    truth: Label | float | list[Label | float] | UnsetType = UNSET
    """Classification: a label. Multilabel: labels. Regression: a number, or one for each target."""
    durable: bool = False
    """Answer once it is on disk."""
    source: Name = ""
    """Where the truth comes from; the settings say what it is worth."""

    def __post_init__(self) -> None:
        if (self.label is UNSET) == (self.truth is UNSET):
            raise ValueError("give either label or truth")

    @property
    def given(self) -> Any:
        """Whichever of the two was given."""
        return self.truth if self.label is UNSET else self.label


class RewardRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How right a prediction proved, without the truth being known."""

    id: Id
    value: Annotated[float, Meta(ge=0, le=1)]
    """1: its label was right; 0: it was wrong; 0.5 says nothing."""
    source: Name = ""


class AskRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wish for predictions to label."""

    count: Annotated[int, Meta(ge=1)]
    """Most of them; the day's budget may leave fewer."""


class AskReply(msgspec.Struct, frozen=True):
    """The predictions whose labels would be worth most, best first: answer with `observe`."""

    requests: list[LabelRequest]


class LabelRuling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a new label may become one of the model's."""

    label: Label
    accept: bool
    """False: its samples are erased, and further ones refused."""


class LearnNowRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing has to be said."""


class ForgetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to erase: all that is kept of the predictions in `ids`, or with `all` everything that was learned from."""

    ids: Annotated[list[Id], Meta(min_length=1)] | UnsetType = UNSET
    all: bool = False

    def __post_init__(self) -> None:
        if (self.ids is UNSET) != self.all:
            raise ValueError("give either ids or all")


class ForgetReply(msgspec.Struct, frozen=True):
    """How many rows were erased."""

    rows: int


class SkewScore(msgspec.Struct, frozen=True):
    """How often the head was right on one kind of rows."""

    name: str
    """training, judge, next_day, live or holdout."""
    score: float
    rows: int
    low: float
    high: float
    """Interval of 95 %."""


class SkewReply(msgspec.Struct, frozen=True):
    """Scores of the head in use, those of fewer than 10 rows left out; and what differs between them, in words."""

    scores: list[SkewScore]
    findings: list[str]

    @classmethod
    def of(cls, skew: Skew) -> SkewReply:
        """The reply that tells a device's scores."""
        rows = [SkewScore(row.name, row.score, row.rows, *row.interval) for row in skew.table()]
        return cls(rows, findings(skew))


class LineageEntry(msgspec.Struct, frozen=True):
    """How a head came to be, or why it did not."""

    time: float
    release: int
    parent: int
    """The head in use then."""
    head: int | None
    """Its number, if it was promoted."""
    outcome: str
    """promoted, would_promote, rejected, superseded or learn_failed."""
    detail: dict[str, Any]
    """Reason, trigger, rows, settings, seed, cost and the verdict's numbers."""


class LineageReply(msgspec.Struct, frozen=True):
    """The latest of them, oldest first."""

    lineage: list[LineageEntry]

    @classmethod
    def of(cls, entries: list[Lineage]) -> LineageReply:
        """The reply that tells what a device has noted."""
        return cls([LineageEntry(*entry) for entry in entries])


class Health(msgspec.Struct, frozen=True):
    """Whether there is a model to predict with."""

    ready: bool


class ErrorDetail(msgspec.Struct, frozen=True):
    """`type` is for programs, `message` for people."""

    type: str
    message: str


class ErrorReply(msgspec.Struct, frozen=True):
    """Every answer of 400 and above."""

    error: ErrorDetail


def read_state(state: dict[str, Any]) -> dict[str, AnyArray]:
    """The state of a request as arrays.

    Raises:
        ShapeError: One is ragged.
    """
    arrays = {}
    for name, value in state.items():
        try:
            arrays[name] = np.asarray(value)
        except ValueError as error:
            raise ShapeError(f"state {name!r} is not an array: {error}") from error
    return arrays


def _by_name(names: tuple[str, ...], values: NDArray[np.float32]) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


# ---- the document

_ERRORS = {
    400: "The JSON is malformed, or a field is unknown, missing or of another type.",
    403: "A page of another site asks (loopback only).",
    408: "The body took too long.",
    409: "The id waits for its label already.",
    413: "The body, or the batch, is too large.",
    415: "Another content type.",
    422: "The input or the label does not fit the model; the type says how.",
    429: "As many requests as allowed wait already: try again after Retry-After seconds.",
    500: "The model failed, or something unforeseen happened.",
    503: "No release is installed yet, or the disk could not be written.",
}
_BINARY_QUERY = (
    ("shape", True, {"type": "string"}, "Sizes with commas, of one sample or with batch of all: 1,28,28"),
    ("dtype", False, {"type": "string", "enum": list(DTYPES), "default": "float32"}, "Little-endian."),
    ("batch", False, {"type": "boolean", "default": False}, "Whether the first size counts samples."),
    ("id", False, {"type": "string", "maxLength": 128}, "As in JSON."),
    ("slice", False, {"type": "string", "maxLength": MAX_NAME_CHARS}, "As in JSON."),
)
BINARY_PARAMETERS = frozenset(name for name, *_ in _BINARY_QUERY)
_REFUSED = (400, 403, 408, 413, 415, 429, 500, 503)
"""What every request with a body may be answered."""


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 description of `edge serve`."""
    kinds = (PredictRequest, PredictReply, BatchReply, ObserveRequest, RewardRequest, AskRequest, AskReply,
             LabelRuling, LearnNowRequest, ForgetRequest, ForgetReply, SkewReply, LineageReply, Health, ErrorReply,
             Status)  # fmt: skip
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    binary = {"schema": {"type": "string", "format": "binary"}}
    predict = _operation(
        "predict",
        "Predict one sample or several",
        {200: ("One prediction, or for `rows` one for each", [PredictReply, BatchReply])},
        (*_REFUSED, 409, 422),
        body={"application/json": _schema(PredictRequest), "application/octet-stream": binary},
    )
    predict["parameters"] = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": schema,
            "description": f"Binary bodies only{', where it is required' if needed else ''}. {text}",
        }
        for name, needed, schema, text in _BINARY_QUERY
    ]
    lineage = _operation(
        "lineage", "How each head came to be", {200: ("The latest, oldest first", [LineageReply])}, (400, 429)
    )
    schema = {"type": "integer", "minimum": 1, "maximum": MAX_LINEAGE, "default": 100}
    lineage["parameters"] = [
        {"name": "limit", "in": "query", "required": False, "schema": schema, "description": "Most of them."}
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge serve", "version": __version__, "description": "One device, for apps of its machine."},
        "paths": {
            "/predict": {"post": predict},
            "/observe": {
                "post": _told(
                    "observe",
                    "Tell the truth about a prediction",
                    ObserveRequest,
                    {202: ("Taken; on disk at the next flush", []), 204: ("Durable, and on disk", [])},
                )
            },
            "/reward": {
                "post": _told(
                    "reward",
                    "Say how right a prediction proved",
                    RewardRequest,
                    {202: ("Taken; on disk at the next flush", [])},
                )
            },
            "/label-requests": {
                "post": _told(
                    "labelRequests",
                    "Ask which predictions to label",
                    AskRequest,
                    {200: ("Those whose labels would be worth most", [AskReply])},
                )
            },
            "/labels": {
                "post": _told(
                    "ruleOnLabel", "Accept or refuse a new label", LabelRuling, {204: ("Done, and on disk", [])}
                )
            },
            "/learn-now": {
                "post": _told(
                    "learnNow",
                    "Learn as soon as there are enough new labelled rows",
                    LearnNowRequest,
                    {202: ("Taken; it begins at the next step for which there are enough", [])},
                )
            },
            "/forget": {
                "post": _told(
                    "forget",
                    "Erase what is kept of predictions, or all that was learned",
                    ForgetRequest,
                    {200: ("How many rows were erased", [ForgetReply]), 204: ("Everything was erased", [])},
                )
            },
            "/skew": {
                "get": _operation(
                    "skew",
                    "Where the score falls between training and use",
                    {200: ("Scores and findings", [SkewReply])},
                    (429,),
                )
            },
            "/lineage": {"get": lineage},
            "/status": {"get": _operation("status", "How the device is", {200: ("Aggregates", [Status])}, (429,))},
            "/healthz": {
                "get": _operation(
                    "healthz", "Whether there is a model to predict with", {200: ("Yes", [Health])}, (503,)
                )
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document",
                    "responses": {"200": {"description": "OpenAPI 3.1", "content": {"application/json": {}}}},
                }
            },
        },
        "components": {"schemas": schemas},
    }


def _told(name: str, summary: str, body: type, replies: dict[int, tuple[str, list[type]]]) -> dict[str, Any]:
    """A request with a JSON body."""
    return _operation(name, summary, replies, (*_REFUSED, 422), body={"application/json": _schema(body)})


def _operation(
    name: str,
    summary: str,
    replies: dict[int, tuple[str, list[type]]],
    errors: tuple[int, ...],
    *,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for code, (description, kinds) in replies.items():
        responses[str(code)] = {"description": description}
        if kinds:
            responses[str(code)]["content"] = {"application/json": _schema(*kinds)}
    for code in sorted(errors):
        responses[str(code)] = {
            "description": _ERRORS[code],
            "content": {"application/json": _schema(ErrorReply)},
        }
    found: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if body is not None:
        found["requestBody"] = {"required": True, "content": body}
    return found


def _schema(*kinds: type) -> dict[str, Any]:
    refs = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    return {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}
