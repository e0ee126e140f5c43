"""OpenTelemetry's traces become spans; what is no trace is told so, whatever it is."""

import gzip
import json

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from raygent.actors import otlp
from raygent.actors.otlp import PROTOBUF, spans_of, unzipped


@pytest.fixture
def exported() -> bytes:
    """What OpenTelemetry's own exporter would send of two spans, one of which failed."""
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("agent")
    with pytest.raises(LookupError), tracer.start_as_current_span("plan", attributes={"depth": 2, "cost": 0.5}):
        with tracer.start_as_current_span("search", attributes={"q": "ü", "hits": ["a", "b"], "found": False}):
            pass
        raise LookupError("no table")
    return encode_spans(memory.get_finished_spans()).SerializeToString()


def read(body, content_type, encoding):
    return spans_of(unzipped(body, encoding), content_type)


@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_spans_as_the_exporter_sends_them(exported, encoding):
    body = gzip.compress(exported) if encoding else exported
    search, plan = read(body, PROTOBUF, encoding)
    assert (search["name"], search["kind"]) == ("search", "otlp")
    ids = {name: search["attributes"].pop(f"otlp.{name}") for name in ("trace_id", "span_id", "parent_span_id")}
    assert search["attributes"] == {"q": "ü", "hits": ["a", "b"], "found": False}
    assert plan["started"] <= search["started"] <= search["finished"] <= plan["finished"]
    assert (plan["attributes"]["depth"], plan["attributes"]["cost"]) == (2, 0.5)
    assert plan["attributes"]["otlp.status"]["code"] == 2
    assert plan["attributes"]["otlp.trace_id"] == ids["trace_id"] != "0" * 32
    assert plan["attributes"]["otlp.span_id"] == ids["parent_span_id"] != ids["span_id"]
    assert "otlp.parent_span_id" not in plan["attributes"]  # it is the root
    assert [len(bytes.fromhex(ids[name])) for name in ids] == [16, 8, 8]
    (event,) = plan["attributes"]["otlp.events"]
    assert (event["name"], event["exception.message"]) == ("exception", "no table")


def test_spans_in_json():
    value = {"kvlistValue": {"values": [{"key": "a", "value": {"intValue": "7"}}, {"key": "b", "value": {}}]}}
    span = {"name": "s", "attributes": [{"key": "x", "value": value}], "startTimeUnixNano": "1500000000"}
    span |= {"traceId": "5b8efff798038103d269b633813fc60c", "spanId": "eee19b7ec3c1b174", "parentSpanId": ""}
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()
    ids = {"otlp.trace_id": span["traceId"], "otlp.span_id": span["spanId"]}
    attributes = {"x": {"a": 7, "b": None}} | ids
    told = {"kind": "otlp", "name": "s", "attributes": attributes, "started": 1.5, "finished": 0.0}
    assert read(body, "application/json", "") == [told]
    assert read(b"{}", "application/json", "") == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ODD = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["resourceSpans", "scopeSpans", "spans", "attributes", "key", "value", "intValue", "events", "status"]
            ),
            inner,
            max_size=4,
        )
    ),
)


@settings(max_examples=300)
@given(ODD, st.binary(max_size=60))
def test_anything_else_is_a_value_error(tree, raw):
    for body, kind, encoding in (
        (json.dumps(tree).encode(), "application/json", ""),
        (json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [tree]}]}]}).encode(), "application/json", ""),
        (raw, PROTOBUF, ""),
        (raw, "", "gzip"),
        (raw, "", "br"),
    ):
        try:
            assert isinstance(read(body, kind, encoding), list)
        except ValueError as error:
            assert str(error)


def test_what_is_nested_too_deep_is_refused():
    """Ray could not hand it on with what the other attempts of a replica made."""
    value = '{"foo": ' + "[" * 600 + "]" * 600 + "}"
    body = f'{{"resourceSpans": [{{"scopeSpans": [{{"spans": [{{"attributes": [{{"key": "x", "value": {value}}}]}}]}}]}}]}}'
    with pytest.raises(ValueError, match="nested more than 200 deep"):
        spans_of(body.encode(), "application/json")


def test_what_unzips_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(otlp, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="over 0 MiB unzipped"):
        read(gzip.compress(b" " * 2000), "application/json", "gzip")
    whole = gzip.compress(b"{}")
    assert read(whole, "application/json", "gzip") == []
    with pytest.raises(ValueError, match="cut off"):
        read(whole[:-1], "application/json", "gzip")


@pytest.mark.parametrize("kind", [PROTOBUF, "application/json"])
def test_more_spans_than_are_kept_are_refused(kind, monkeypatch):
    monkeypatch.setattr(otlp, "MOST_SPANS", 3)
    for number in (3, 4):
        tree = {"resourceSpans": [{"scopeSpans": [{"spans": [{}] * 2}, {"spans": [{}] * (number - 2)}]}]}
        request = ParseDict(tree, ExportTraceServiceRequest())
        body = request.SerializeToString() if kind == PROTOBUF else json.dumps(tree).encode()
        if number == 3:
            assert len(spans_of(body, kind)) == 3
        else:
            with pytest.raises(ValueError, match="4 spans in a request; send at most 3 at once"):
                spans_of(body, kind)
