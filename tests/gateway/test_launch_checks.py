"""Preflight sentences."""

import os
import socket

from cacheengine.build import compiler
from gateway.launch import checks
from gateway.launch.config import LaunchConfig

GIB = 1 << 30


def config(**flags) -> LaunchConfig:
    return LaunchConfig.load(env={}, **flags)


def test_a_listening_port_is_not_free_and_its_owner_is_known():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not checks.port_is_free(port)
        assert checks.port_owner(port) == os.getpid()
    assert checks.port_is_free(port)
    assert checks.port_owner(port) is None


def test_a_port_whose_owner_cannot_be_seen_is_still_a_sentence():
    assert checks.port_sentence(8000, None) == "port 8000 is in use; stop it or choose another with PORT=8100"


def test_memory_is_judged_per_worker():
    assert checks.memory_sentence(config(worker_count=1), 6 * GIB) == ""
    assert "2 worker(s) need about 9 GiB" in checks.memory_sentence(config(worker_count=2), 6 * GIB)


def test_unknown_memory_stops_nobody():
    assert checks.memory_sentence(config(worker_count=99), None) == ""


def test_available_memory_is_read_from_the_kernel(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert checks.available_memory(tmp_path / "meminfo") == 2 << 20
    assert checks.available_memory(tmp_path / "absent") is None


def test_a_missing_compiler_is_said_before_a_missing_build():
    assert "install g++" in checks.native_sentence(False, "")
    assert "make install" in checks.native_sentence(False, "/usr/bin/g++")
    assert checks.native_sentence(True, "/usr/bin/g++") == ""


def test_any_known_compiler_will_do():
    assert compiler(lambda name: "/opt/clang++" if name == "clang++" else None) == "/opt/clang++"
    assert compiler(lambda name: None) == ""


def test_the_disk_tier_must_fit_and_old_files_count_as_room(tmp_path):
    wants = config(home=tmp_path, disk_bytes="1MiB", worker_count=1)
    assert "--no-disk" in checks.disk_sentence(wants, 1000)
    old = tmp_path / "disk" / "w1" / "rank0.slots"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x" * (1 << 20))
    assert checks.disk_sentence(wants, 1000) == ""
    assert checks.disk_sentence(config(home=tmp_path, disk_bytes=0), 0) == ""


def test_free_space_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path):
    assert checks.disk_free(tmp_path / "not" / "yet") > 0
