"""Whether requests are traced: as the standard OTEL_* variables say.

Where they name nobody to send spans to, nothing of OpenTelemetry is imported.
"""

import importlib
from collections.abc import Mapping

from cacheengine.config import ConfigError
from gateway.exchange import Exchange
from gateway.proxy import Client
from gateway.trace import NO_TRACE, Trace


class Tracer:
    """Makes a Trace for each request; this one does not."""

    def begin(self, client: Client, route: str, arrived: float) -> Trace:
        """A request came for this route, at `arrived` (perf_counter); it may continue its caller's trace."""
        return NO_TRACE

    def ended(self, exchange: Exchange) -> None:
        """The request is over, and everything is known of it."""

    async def close(self) -> None:
        """Send what is left, or give up soon."""


NO_TRACER = Tracer()


def tracer(env: Mapping[str, str]) -> Tracer:
    """What the environment asks for: opentelemetry.io/docs/specs/otel/protocol/exporter and
    …/configuration/sdk-environment-variables.  Raises ConfigError."""
    where = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none"
    if not where or off:
        return NO_TRACER
    spoken = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if spoken and spoken != "http/protobuf":
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {spoken!r}, but the gateway sends spans as http/protobuf only: "
            "name the collector's HTTP port (usually 4318) and that protocol"
        )
    try:
        made: Tracer = importlib.import_module("gateway.spans").OtelTracer()
    except ImportError as exc:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but {exc.name} is not installed: "
            "install cairn-serve[otel], or unset it"
        ) from exc
    return made
