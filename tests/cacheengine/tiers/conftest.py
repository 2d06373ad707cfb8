"""A second pair of eyes on the server under test."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis


@pytest.fixture
def admin(valkey: Any) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        yield client
