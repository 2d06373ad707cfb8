"""What /openapi.json promises, asked of a real gateway process by schemathesis: nothing it can think of, with
the schema or against it, is a 5xx, and every refusal has OpenAI's shape."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.fakes import serve
from tests.gateway.process import Gateway, started
from tests.gateway.test_hostile_bodies import Obliging, well_said

pytestmark = pytest.mark.e2e

EXAMPLES = 8  # of each operation, with and against the schema
PATIENT = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Yes(Obliging):
    """To everything that is posted."""

    @staticmethod
    def asked_to(scope: Any) -> bool:
        return bool(scope["method"] == "POST")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("openapi")
    with serve(Yes()) as url, started(folder, f"fake={url}") as made:
        yield made


def test_every_operation_keeps_its_word(gateway: Gateway) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{gateway.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 5
    asked = 0
    for operation, mode in itertools.product(operations, GenerationMode):

        @PATIENT
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            nonlocal asked
            asked += 1
            reply = case.call(timeout=30)
            assert reply.status_code < 500, (case.method, case.path, reply.text)
            if reply.status_code >= 400:
                assert well_said(case.formatted_path, reply.json()), reply.text

        with contextlib.suppress(Unsatisfiable):  # without parameters there is nothing to do wrong
            holds()
    print(f"{asked} requests to {len(operations)} operations")
    assert asked > EXAMPLES * len(operations) / 2
    assert gateway.inflight() == 0
