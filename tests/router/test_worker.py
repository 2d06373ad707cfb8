"""From a lease to a worker."""

from dataclasses import replace

from cacheengine.index_schema import Lease, WorkerInfo
from cacheengine.keys import KeyScheme, namespace_of, probe_keys
from router.worker import StaticWorker, from_lease, from_static, majority_scheme

SCHEME = KeyScheme(namespace_of({"model": "m"}), 256)
INFO = WorkerInfo(
    "a", "http://a:1/", "m", "/m", SCHEME.namespace.hex(), 256, tuple(probe_keys(SCHEME)), payload_bytes=2560
)


def test_a_lease_carries_everything_the_router_reads() -> None:
    worker = from_lease(Lease(INFO, {"running": "2", "queued_tokens": "x", "waiting": "-1"}))
    assert (worker.id, worker.url, worker.scheme, worker.token_bytes) == ("a", "http://a:1", SCHEME, 10)
    assert (worker.load.running, worker.load.queued_tokens, worker.load.waiting) == (2, 0, 0)


def test_a_lease_survives_the_trip_through_redis() -> None:
    assert WorkerInfo.parse(INFO.fields() | {"running": "2"}) == INFO
    assert WorkerInfo.parse(replace(INFO, probe_keys=(), tiers=()).fields()).probe_keys == ()


def test_other_probe_keys_mean_no_scheme() -> None:
    assert from_lease(Lease(replace(INFO, probe_keys=INFO.probe_keys[:-1]), {})).scheme is None


def test_a_static_worker_is_named_by_its_address() -> None:
    worker = from_static(StaticWorker("http://10.0.0.1:8001/", "m"))
    assert (worker.id, worker.url, worker.scheme) == ("10.0.0.1:8001", "http://10.0.0.1:8001", None)


def test_a_tie_of_schemes_is_settled_alike_everywhere() -> None:
    other = KeyScheme(namespace_of({"model": "n"}), 256)
    twin = replace(INFO, namespace=other.namespace.hex(), probe_keys=tuple(probe_keys(other)))
    two = [from_lease(Lease(INFO, {})), from_lease(Lease(twin, {}))]
    assert majority_scheme(two) == majority_scheme(two[::-1])
    assert majority_scheme([]) is None
