"""`cairn status`: rows from what /admin/workers says."""

from rich.console import Console

from gateway.launch import status

WORKER = {
    "id": "w1",
    "url": "http://127.0.0.1:8001",
    "model": "m",
    "state": "ready",
    "stale": False,
    "load": {"running": 2.0, "waiting": 1.0},
    "beat": {
        "host_used": "30",
        "host_slots": "60",
        "lookup_tokens": "1000",
        "hit_tokens_host": "600",
        "hit_tokens_disk": "150",
    },
}


def row(**changes):
    return status.summary([status.flat(WORKER | changes)])[0]


def test_a_worker_is_shown_with_its_fill_and_hit_rate():
    shown = row()
    assert (shown["id"], shown["state"], shown["running"], shown["waiting"]) == ("w1", "ready", 2.0, 1.0)
    assert shown["host"] == "50 % of 60"
    assert shown["disk"] == "–"
    assert (shown["hit_rate"], shown["device_hit_rate"]) == (0.75, None)


def test_what_the_device_had_is_a_hit_too_and_shown_apart():
    beat = {"lookup_tokens": "1000", "hit_tokens_device": "900", "hit_tokens_host": "0"}
    shown = row(beat=beat)
    assert (shown["hit_rate"], shown["device_hit_rate"]) == (0.9, 0.9)
    shown = row(beat=beat | {"hit_tokens_host": "50"})
    assert (shown["hit_rate"], shown["device_hit_rate"]) == (0.95, 0.9)


def test_a_worker_whose_heartbeat_is_not_heard_is_stale():
    assert row(stale=True)["state"] == "stale"
    assert row(stale=True, state="down")["state"] == "down"


def test_a_worker_somebody_drained_is_shown_so():
    assert [row(state=state)["state"] for state in ("draining", "drained")] == ["draining", "drained"]


def test_whether_the_index_is_right_about_a_worker_is_shown():
    def trust(local, shared):
        return row(trust={"local": {"state": local}, "shared": {"state": shared}})["trust"]

    assert trust("EXACT", "UNKNOWN") == "exact"
    assert trust("EXACT", "STALE") == "stale"
    assert trust("UNKNOWN", "UNKNOWN") == row()["trust"] == "–"


def test_a_worker_that_reports_nothing_has_dashes_not_zeros():
    shown = row(load=None, beat=None)
    assert (shown["running"], shown["host"], shown["hit_rate"]) == (None, "–", None)


def test_nonsense_in_a_heartbeat_is_left_out():
    assert row(beat={"host_slots": "many", "lookup_tokens": "?"})["host"] == "–"


def test_the_table_has_a_line_per_worker():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status.table([row(), row(id="w2", state="down")]))
    console.file.close()
    text = console.export_text()
    assert "w1" in text
    assert "w2" in text
    assert "75 %" in text
    assert "device" in text
    assert "since it started" in text
