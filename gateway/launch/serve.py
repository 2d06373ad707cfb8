"""Run as a program: the gateway under uvicorn.  `python -m gateway.launch.serve '{"port": 8000}'`

The argument is a JSON object of GatewayConfig fields (plus `config`, a YAML file); the environment fills
the rest.
"""

import json
import os
import signal
import sys

import uvicorn

from cacheengine.config import ConfigError
from gateway import logs
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.connection import connections
from gateway.tracing import tracer

CONNECTIONS = 2  # for each of max_inflight: keep-alive connections wait for their next request
GRACE_SECONDS = 5  # open streams may finish for this long after SIGTERM


def main() -> None:
    flags = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    try:
        config = GatewayConfig.load(flags.pop("config", None), **flags)
        traced = tracer(os.environ)
    except ConfigError as exc:
        sys.exit(f"cairn gateway: {exc}")
    # uvicorn stops by itself, then raises the signal again: let what is below end as after Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with logs.opened(config):
        uvicorn.run(
            create_app(config, tracer=traced),
            host=config.host,
            port=config.port,
            loop="uvloop",
            http=connections(config.receive_timeout_seconds, CONNECTIONS * config.max_inflight),
            ws="none",
            access_log=False,
            log_level=config.log_level,
            log_config=None,  # its lines are ours too
            timeout_graceful_shutdown=GRACE_SECONDS,
        )


if __name__ == "__main__":
    main()
