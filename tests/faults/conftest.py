"""Engines that must balance their books when a test is over, whatever was done to what lies below them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import torch

from tests.faults.rig import MiniEngine


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The pages are tiny: torch's thread pool would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def keep() -> Iterator[Callable[[MiniEngine], MiniEngine]]:
    """keep(engine): settled, checked and closed at the end."""
    kept: list[MiniEngine] = []

    def mine(engine: MiniEngine) -> MiniEngine:
        kept.append(engine)
        return engine

    yield mine
    try:
        for engine in kept:
            engine.settle()
    finally:
        for engine in kept:
            engine.close()


@pytest.fixture
def admin(valkey: Any) -> Iterator[redis.Redis]:
    with valkey.client() as client:
        yield client
