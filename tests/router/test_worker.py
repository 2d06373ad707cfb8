"""From a lease to a worker."""

from dataclasses import replace
from typing import Any

import pytest

from cacheengine.index_schema import Lease, WorkerInfo
from cacheengine.keys import KeyScheme, namespace_of, probe_keys
from router.worker import MAX_LOAD, StaticWorker, base_url, from_lease, from_static, majority_scheme

SCHEME = KeyScheme(namespace_of({"model": "m"}), 256)
INFO = WorkerInfo(
    "a", "http://a:1/", "m", "/m", SCHEME.namespace.hex(), 256, tuple(probe_keys(SCHEME)), payload_bytes=2560
)


def test_a_lease_carries_everything_the_router_reads() -> None:
    worker = from_lease(Lease(INFO, {"running": "2", "queued_tokens": "x", "waiting": "-1"}))
    assert (worker.id, worker.url, worker.scheme, worker.token_bytes) == ("a", "http://a:1", SCHEME, 10)
    assert (worker.load.running, worker.load.queued_tokens, worker.load.waiting) == (2, 0, 0)


@pytest.mark.parametrize("said", ["inf", "1e999", "-inf", "nan"])
def test_a_number_that_is_not_finite_was_not_measured(said: str) -> None:
    beat = dict.fromkeys(("running", "queued_tokens", "prefill_rate", "bw_disk", "beat_ms"), said)
    assert from_lease(Lease(INFO, beat)).load == from_lease(Lease(INFO, {})).load


def test_an_absurd_number_is_cut() -> None:
    assert from_lease(Lease(INFO, {"queued_tokens": "1e300"})).load.queued_tokens == MAX_LOAD


@pytest.mark.parametrize(
    "lie",
    [
        {"payload_bytes": 10**400},
        {"payload_bytes": -1},
        {"chunk_tokens": 10**400},
        {"chunk_tokens": 0},
        {"url": "http://c:8O00"},
        {"url": "http://user:hunter2@h:1"},
        {"namespace": "no hex"},
    ],
)
def test_a_lease_that_cannot_be_is_refused_in_one_way(lie: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a: |hexadecimal") as refused:
        from_lease(Lease(replace(INFO, **lie), {}))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://h", "http://h:1/", "https://a.b-c.d_e:65535", "http://h./", "http://10.0.0.1:1",
        "http://[::1]:80", "http://[fe80::1%eth0]:80", "http://h:1/prefix/",
    ],
)  # fmt: skip
def test_a_url_that_can_be_asked_stays_as_it_is(url: str) -> None:
    assert base_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://c:8O00", "http://c:99999", "http://c:0", "http://a..b:80", "http://a b", "http://x\x7fy",
        "http://:80", "http://", "h:1", "", "ftp://h", "http://[bad]:80", "http://" + "a" * 70,
        "http://user:hunter2@h:1", "http://hunter2@h", "http://h:hunter2@h:8O", "http://h?hunter2",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_asked_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="of a worker") as refused:
        from_static(StaticWorker(url, "m"))
    assert "hunter2" not in str(refused.value)


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
