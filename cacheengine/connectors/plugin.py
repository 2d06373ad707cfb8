"""vLLM's general plugin: registers the connector by name in every vLLM process.

MultiConnector and the stats path look connectors up in the registry only, so the module path in
--kv-transfer-config is not enough for them.  Cheap: nothing heavy is imported here.
"""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from cacheengine.offline import CONNECTOR, CONNECTOR_MODULE


def register() -> None:
    """Idempotent: vLLM may load plugins more than once per process."""
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
