"""OpenTelemetry traces, as exporters send them over OTLP/HTTP, to the spans of an attempt.

https://opentelemetry.io/docs/specs/otlp/#otlphttp: protobuf or JSON, whole or gzipped.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from raygent.actors.nesting import MOST_NESTED, nested_over

PROTOBUF = "application/x-protobuf"
MAX_BYTES = 16 << 20  # of a request, unzipped
MOST_SPANS = 10_000  # of a request, and of an attempt: an empty one has two bytes there, and hundreds as a record
NANO = 1e9
IDS = {"otlp.trace_id": "traceId", "otlp.span_id": "spanId", "otlp.parent_span_id": "parentSpanId"}


def unzipped(body: bytes, encoding: str) -> bytes:
    """A request's body without its content encoding. Raises ValueError where that is unknown, broken, or hides more than
    MAX_BYTES."""
    if encoding == "gzip":
        body = _gunzipped(body)
    elif encoding not in ("", "identity"):
        raise ValueError(f"content-encoding {encoding!r}; use gzip or none")
    if len(body) > MAX_BYTES:
        raise ValueError(f"over {MAX_BYTES >> 20} MiB")
    return body


def spans_of(body: bytes, content_type: str) -> list[dict[str, Any]]:
    """The spans of an export request: name, kind "otlp", attributes (with `otlp.trace_id`, `otlp.span_id`,
    `otlp.parent_span_id` in hex, and status and events where they say something), started, finished (Unix seconds).
    Raises ValueError where the body is no such request."""
    protobuf = content_type.startswith(PROTOBUF)
    if protobuf:
        try:
            request = ExportTraceServiceRequest.FromString(body)
        except DecodeError as error:
            raise ValueError(f"no ExportTraceServiceRequest: {error}") from error
        _check_number(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        whole = MessageToDict(request, use_integers_for_enums=True)
    try:
        if not protobuf:
            whole = json.loads(body)
            if nested_over(whole, MOST_NESTED):
                raise ValueError(f"nested more than {MOST_NESTED} deep")
        every = [
            scope.get("spans") or []
            for resource in whole.get("resourceSpans") or []
            for scope in resource.get("scopeSpans") or []
        ]
        _check_number(map(len, every))
        return [_span(span, _hex if protobuf else str) for spans in every for span in spans]
    except (TypeError, AttributeError, LookupError, RecursionError, OverflowError) as error:
        raise ValueError(f"no ExportTraceServiceRequest: {error}") from error


def _check_number(counts: Iterable[int]) -> None:
    if (number := sum(counts)) > MOST_SPANS:
        raise ValueError(f"{number} spans in a request; send at most {MOST_SPANS} at once")


def _gunzipped(body: bytes) -> bytes:
    stream = zlib.decompressobj(31)
    try:
        whole = stream.decompress(body, MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"not gzip: {error}") from error
    if stream.unconsumed_tail or stream.unused_data or not stream.eof:
        raise ValueError(f"cut off, of several parts, or over {MAX_BYTES >> 20} MiB unzipped")
    return whole


def _span(span: dict[str, Any], id_of: Callable[[Any], str]) -> dict[str, Any]:
    attributes = _attributes(span)
    ids = {name: span.get(key) for name, key in IDS.items()}
    attributes |= {name: id_of(found) for name, found in ids.items() if found}
    if status := {key: value for key, value in (span.get("status") or {}).items() if value}:
        attributes["otlp.status"] = status
    if events := span.get("events"):
        attributes["otlp.events"] = [{"name": str(event.get("name") or ""), **_attributes(event)} for event in events]
    started, finished = (int(span.get(key) or 0) / NANO for key in ("startTimeUnixNano", "endTimeUnixNano"))
    return {
        "kind": "otlp",
        "name": str(span.get("name") or ""),
        "attributes": attributes,
        "started": started,
        "finished": finished,
    }


def _hex(base64_text: str) -> str:
    """An id as OTLP's JSON has it; MessageToDict gives base64 of its bytes."""
    return base64.b64decode(base64_text).hex()


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    return {str(entry["key"]): _value(entry.get("value") or {}) for entry in of.get("attributes") or []}


def _value(value: dict[str, Any]) -> Any:
    """The value of an AnyValue."""
    kind: str
    inner: Any
    kind, inner = next(iter(value.items()), ("none", None))
    if kind == "intValue":
        return int(inner)  # JSON has 64-bit integers as text
    if kind == "arrayValue":
        return [_value(item) for item in inner.get("values") or []]
    if kind == "kvlistValue":
        return {str(entry["key"]): _value(entry.get("value") or {}) for entry in inner.get("values") or []}
    return str(inner) if isinstance(inner, float) and not math.isfinite(inner) else inner
