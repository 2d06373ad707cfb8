"""`cairn keys`: what it prints, what it keeps, and what it says when it cannot."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.cli import app
from gateway.keyring import SECRET, digest_of
from tests.conftest import ValkeyServer
from tests.fakes import refusing_url


def cairn(*args: str) -> Result:
    return CliRunner().invoke(app, ["keys", *args])


def listed(*where: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(cairn("list", *where, "--json").stdout)
    return rows


def test_a_key_is_printed_once_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    made = cairn("create", "--tenant", "shop", "--file", str(file), "--rpm", "5", "--models", "a, b")
    key = made.stdout.strip()
    assert key.startswith("cairn-")
    assert len(key) == len("cairn-") + 43, "256 bits in base64url"
    assert key not in made.stderr
    kept = file.read_text()
    assert key not in kept
    assert digest_of(key.encode()) in kept
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (row,) = listed("--file", str(file))
    assert (row["tenant"], row["rpm"], row["models"]) == ("shop", 5, ["a", "b"])
    shown = cairn("list", "--file", str(file)).stdout
    assert str(row["id"]) in shown
    for secret in (key, digest_of(key.encode())):
        assert secret not in shown + json.dumps(row)


MANY = """
import sys
from typer.testing import CliRunner
from gateway.cli import app
input()
for _ in range(30):
    done = CliRunner().invoke(app, ["keys", "create", "--tenant", "t", "--file", sys.argv[1]])
    assert not done.exit_code, done.output
"""


@pytest.mark.e2e
def test_two_who_make_keys_at_once_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    makers = [
        subprocess.Popen([sys.executable, "-c", MANY, str(file)], stdin=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for maker in makers:
            assert maker.stdin
            maker.stdin.write(b"\n")
            maker.stdin.flush()
        assert [maker.wait(120) for maker in makers] == [0, 0]
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()
    assert len(listed("--file", str(file))) == 60
    assert stat.S_IMODE((tmp_path / ".keys.yaml.lock").stat().st_mode) == 0o600


def test_keys_in_redis_are_made_listed_and_revoked_and_the_salt_s_secret_stays(valkey: ValkeyServer) -> None:
    where = ("--redis-url", valkey.url)
    key = json.loads(cairn("create", "--tenant", "a", "--expires", "30d", "--json", *where).stdout)
    with valkey.client() as client:
        secret = client.hget("cairn:keys", SECRET)
        assert len(secret) == 64
    cairn("create", "--tenant", "b", *where)
    with valkey.client() as client:
        assert client.hget("cairn:keys", SECRET) == secret, "or isolated tenants lose their cache"
        assert client.hexists("cairn:keys", digest_of(key["key"].encode()))
    assert key["expires"] - key["created"] == 30 * 86_400
    assert cairn("revoke", key["id"], *where).exit_code == 0
    assert [row["tenant"] for row in listed(*where)] == ["b"]
    with valkey.client() as client:
        assert client.hget("cairn:keys", SECRET) == secret


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("create", "--tenant", "a b"), "up to 64 letters"),
        (("create", "--tenant", "a", "--expires", "soon"), "--expires takes a number"),
        (("create", "--tenant", "a", "--weight", "0"), "above 0"),
        (("create", "--tenant", "a", "--weight", "inf"), "at most"),
        (("create", "--tenant", "a", "--tpm", "1" + 30 * "0"), "at most"),
        (("revoke", "key_none"), "no key is called 'key_none'"),
    ],
)
def test_a_mistake_is_one_sentence_to_act_on(tmp_path: Path, args: tuple[str, ...], sentence: str) -> None:
    done = cairn(*args, "--file", str(tmp_path / "keys.yaml"))
    assert done.exit_code != 0
    assert sentence in done.output + str(done.exception)


def test_a_redis_that_does_not_answer_is_said_so_without_its_password() -> None:
    url = refusing_url().replace("http://", "redis://:pass-word@")
    done = cairn("create", "--tenant", "a", "--redis-url", url)
    assert done.exit_code != 0
    said = done.output + str(done.exception)
    assert "does not answer" in said
    assert "pass-word" not in said
    assert "cairn-" not in done.stdout, "no key that was not kept"
