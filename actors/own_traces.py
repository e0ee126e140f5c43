"""OpenTelemetry's spans of agents in the worker's own process: each to the attempt in whose context it began.

A program's spans come by HTTP (otlp.py); here the tracer provider is one for all attempts that run, so that an exporter could not
tell whose they are.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from raygent.actors.otlp import PROTOBUF, spans_of
from raygent.emit import Sink, sink

logger = logging.getLogger("raygent")
followed: list[Any] = []  # tracer providers


def follow() -> None:
    """Have the process's tracer provider, where an agent has set one of the SDK's, tell its spans to the attempts; it goes on to tell
    its own exporters."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import get_tracer_provider

    provider = get_tracer_provider()
    if isinstance(provider, TracerProvider) and provider not in followed:
        followed.append(provider)
        provider.add_span_processor(_to_attempts())


def _to_attempts() -> Any:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import SpanProcessor

    class ToAttempts(SpanProcessor):
        """A span that ends in another thread or task than it began in is known by its context."""

        def __init__(self) -> None:
            self.begun: dict[tuple[int, int], Sink] = {}  # by trace and span

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if (here := sink.get()) is not None:
                self.begun[span.context.trace_id, span.context.span_id] = here

        def on_end(self, span: Any) -> None:
            there = self.begun.pop((span.context.trace_id, span.context.span_id), None)
            if there is None:
                return
            try:
                for told in spans_of(encode_spans([span]).SerializeToString(), PROTOBUF):
                    there("spans", told)
            except ValueError as error:  # half a surrogate pair, say: no reason for the agent to end by
                logger.warning("a span of the agent's is left out: %s", error)

    return ToAttempts()
