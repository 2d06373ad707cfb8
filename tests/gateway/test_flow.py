"""The queue in front of the fleet, driven step by step and by hypothesis."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import QueueFull, QueueTimeout
from gateway.flow import ELDEST_EVERY, USUAL_SEATS, Tenant, Turn, Turns
from router.worker import Load, Worker


@dataclass(frozen=True, slots=True)
class Anybody:
    name: str = ""
    priority: int = 0
    weight: float = 1.0


ANYBODY = Anybody()
A, B, C = Anybody("a"), Anybody("b"), Anybody("c", weight=3.0)
LATER = Anybody("later", priority=1)


class House:
    """Turns for one model, and whoever has asked for one, by name of the request."""

    def __init__(self, seats: int = 1, max_queue: int = 1000, timeout: float = 600.0) -> None:
        self.workers = [(Worker("w0", "http://w0", "m"),)]
        self.now = 0.0
        self.waits: list[float] = []
        self.refusals: list[str] = []
        self.turns = Turns(
            lambda model: self.workers[-1] if model in ("m", "adapter") else (),
            max_queue,
            timeout,
            seats,
            lambda: self.now,
            self.waits.append,
            self.refusals.append,
        )
        self.tasks: dict[str, asyncio.Task[Turn]] = {}
        self.order: list[str] = []  # in which they got their turns

    async def ask(self, name: str, tenant: Tenant = ANYBODY, tokens: int = 10, model: str = "m") -> None:
        async def take() -> Turn:
            turn = await self.turns.take(model, tenant, tokens)
            self.order.append(name)
            return turn

        self.tasks[name] = asyncio.create_task(take())
        await settle()
        self.turns.check()

    async def end(self, name: str, generated: int = 0) -> None:
        self.tasks[name].result().done(generated)
        await settle()
        self.turns.check()

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        await settle()
        self.turns.check()

    async def drain(self) -> list[str]:
        """Everybody's turn, one after the other; returns the order."""
        before = len(self.order)
        while held := [
            n for n, t in self.tasks.items() if t.done() and not t.cancelled() and not t.exception()
        ]:
            for name in held:
                await self.end(name)
                del self.tasks[name]
        return self.order[before:]


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_where_there_is_room_nothing_is_awaited() -> None:
    house = House(seats=2)
    take = house.turns.take("m", ANYBODY, 10)
    with pytest.raises(StopIteration) as stopped:
        take.send(None)  # no loop runs here: a coroutine that yields would not stop
    assert isinstance(stopped.value.value, Turn)


def test_beyond_the_seats_requests_wait_and_follow_in_order_of_arrival() -> None:
    async def test() -> None:
        house = House(seats=2)
        for name in "abcde":
            await house.ask(name)
        assert (house.order, house.turns.depth) == (["a", "b"], 3)
        await house.end("b")
        await house.end("a")
        assert (house.order, house.turns.depth) == (["a", "b", "c", "d"], 1)
        assert len(house.waits) == 2

    run(test)


def test_a_turn_is_given_back_once() -> None:
    async def test() -> None:
        house = House()
        for name in "abc":
            await house.ask(name)
        await house.end("a")
        await house.end("a")
        assert house.order == ["a", "b"]

    run(test)


def test_who_hangs_up_leaves_the_queue_at_once() -> None:
    async def test() -> None:
        house = House()
        for name in "abc":
            await house.ask(name)
        await house.leave("b")
        assert house.turns.depth == 1
        await house.end("a")
        assert house.order == ["a", "c"]

    run(test)


def test_a_turn_given_to_who_hangs_up_in_that_moment_goes_to_the_next() -> None:
    async def test() -> None:
        house = House()
        for name in "abc":
            await house.ask(name)
        house.tasks["a"].result().done()  # b has it, and has not run since
        await house.leave("b")
        assert house.order == ["a", "c"]

    run(test)


def test_who_hangs_up_in_the_moment_its_turn_comes_costs_no_seat() -> None:
    async def test() -> None:
        house = House()
        for name in "abc":
            await house.ask(name)
        house.tasks["b"].cancel()  # and has not run since
        await house.end("a")
        assert house.order == ["a", "c"]
        await house.end("c")
        await house.ask("d")
        assert house.order == ["a", "c", "d"]

    run(test)


def test_who_hangs_up_in_the_moment_it_is_pushed_out_makes_room_all_the_same() -> None:
    async def test() -> None:
        house = House(max_queue=2)
        for name in ("a0", "a1", "a2"):
            await house.ask(name, A)
        newcomer = asyncio.create_task(house.turns.take("m", B, 10))
        house.tasks["a2"].cancel()  # and will run after the newcomer
        await settle()
        house.turns.check()
        assert house.tasks["a2"].cancelled()
        assert not newcomer.done()
        assert house.refusals == []
        await house.end("a0")
        assert await house.drain() == []
        (await newcomer).done()

    run(test)


def test_the_full_queue_says_when_to_come_back() -> None:
    async def test() -> None:
        house = House(max_queue=3)
        for name in "abcd":
            await house.ask(name)
        await house.ask("e")
        assert isinstance(error := house.tasks["e"].exception(), QueueFull)
        assert error.retry_after == 1  # nobody has left yet: nothing is known
        for name in "ab":
            house.now += 5
            await house.end(name)
        for name in "fgh":
            await house.ask(name)
        assert isinstance(error := house.tasks["h"].exception(), QueueFull)
        assert error.retry_after == 15  # three wait, one goes every five seconds
        assert (error.status, error.code) == (503, "overloaded")
        assert house.refusals == ["queue_full", "queue_full"]

    run(test)


def test_who_waits_too_long_is_told_so_and_is_gone() -> None:
    async def test() -> None:
        house = House(timeout=0.01)
        await house.ask("a")
        await house.ask("b")
        with pytest.raises(QueueTimeout, match="No worker had room") as caught:
            await house.tasks["b"]
        assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        house.turns.check()
        assert (house.turns.depth, house.refusals) == (0, ["queue_timeout"])

    run(test)


def test_a_worker_that_joins_is_noticed_while_somebody_waits() -> None:
    async def test() -> None:
        house = House()
        await house.ask("a")
        await house.ask("b")
        house.workers.append((Worker("w0", "http://w0", "m"), Worker("w1", "http://w1", "m")))
        await house.tasks["b"]

    run(test)


def test_an_adapter_runs_in_its_base_models_seats() -> None:
    async def test() -> None:
        house = House()
        await house.ask("a", model="m")
        await house.ask("b", model="adapter")
        assert house.order == ["a"]
        await house.end("a")
        assert house.order == ["a", "b"]

    run(test)


@pytest.mark.parametrize(("told", "seats"), [(0, USUAL_SEATS), (8, 9), (9, 11), (256, 288)])
def test_seats_are_what_the_worker_tells_and_an_eighth_more(told: int, seats: int) -> None:
    async def test() -> None:
        house = House(seats=0, max_queue=1)
        house.workers = [(Worker("w0", "http://w0", "m", load=Load(max_num_seqs=told)),)]
        for _ in range(seats):
            await house.turns.take("m", ANYBODY, 1)
        await house.ask("one more")
        assert house.turns.depth == 1

    run(test)


def test_tenants_share_by_weight_in_tokens_not_in_requests() -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        for i in range(60):
            await house.ask(f"a{i}", A, tokens=100)
        for i in range(60):
            await house.ask(f"b{i}", B, tokens=50)
        for i in range(60):
            await house.ask(f"c{i}", C, tokens=100)
        first = Counter(name[0] for name in (await house.drain())[:42])
        # of 12 turns: 2 of a, 4 of b, 6 of c, that is 200, 200 and 600 tokens
        assert abs(first["a"] - 7) <= 1
        assert abs(first["b"] - 14) <= 2
        assert abs(first["c"] - 21) <= 2

    run(test)


def test_generated_tokens_are_charged_when_they_are_known() -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        for i in range(30):
            await house.ask(f"a{i}", A)
            await house.ask(f"b{i}", B)
        await house.end("first")
        for _ in range(22):
            name = house.order[-1]
            await house.end(name, generated=45 if name[0] == "a" else 0)
        shares = Counter(name[0] for name in house.order)
        assert shares["b"] >= 8 * shares["a"] * 0.8  # a request of a costs 100 by now, of b 10

    run(test)


@pytest.mark.parametrize("earlier", [0, 2], ids=["new", "known"])
def test_a_tenant_that_was_away_has_saved_up_nothing(earlier: int) -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        for i in range(60):
            await house.ask(f"a{i}", A)
        for i in range(earlier):
            await house.ask(f"early{i}", B)
        for _ in range(20 + earlier):
            await house.end(house.order[-1])
        assert house.turns.depth == 40
        for i in range(20):
            await house.ask(f"b{i}", B)
        after = Counter(name[0] for name in (await house.drain())[:21])
        assert abs(after["a"] - after["b"]) <= 4

    run(test)


def test_priority_goes_first_and_nobody_starves() -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        await house.ask("later", LATER)
        for i in range(4 * ELDEST_EVERY):
            await house.ask(f"a{i}", A)
        order = await house.drain()
        assert 1 < order.index("later") < ELDEST_EVERY

    run(test)


def test_a_flood_does_not_keep_others_out_of_the_queue() -> None:
    async def test() -> None:
        house = House(max_queue=10)
        for i in range(20):
            await house.ask(f"a{i}", A)
        await house.ask("b", B)
        assert not house.tasks["b"].done()
        assert isinstance(house.tasks["a10"].exception(), QueueFull)  # the newest of those that waited
        assert not house.tasks["a9"].done()
        for i in range(20):
            await house.ask(f"b{i}", B)
        waiting = Counter(name[0] for name, task in house.tasks.items() if not task.done())
        assert waiting == {"a": 5, "b": 5}

    run(test)


@dataclass(frozen=True)
class Step:
    verb: str
    which: int
    tenant: Anybody
    tokens: int


STEPS = st.builds(
    Step,
    st.sampled_from(["ask", "ask", "ask", "end", "leave", "both", "grow", "shrink"]),
    st.integers(0, 50),
    st.sampled_from([A, B, C, LATER]),
    st.integers(0, 1000),
)


@given(st.lists(STEPS, max_size=60), st.integers(1, 3), st.integers(0, 8))
@settings(deadline=None)
def test_whatever_happens_it_is_bounded_work_conserving_and_loses_nobody(
    steps: list[Step], seats: int, max_queue: int
) -> None:
    async def test() -> None:
        house = House(seats, max_queue)
        asked = open_ = 0
        for step in steps:
            tasks = list(house.tasks.items())
            here = [n for n, t in tasks if t.done() and not t.cancelled() and not t.exception()]
            match step.verb:
                case "ask":
                    asked += 1
                    await house.ask(f"r{asked}", step.tenant, step.tokens)
                case "end" if here:
                    await house.end(name := here[step.which % len(here)], step.tokens)
                    del house.tasks[name]
                case "leave" if waiting := [name for name, task in tasks if not task.done()]:
                    await house.leave(waiting[step.which % len(waiting)])
                case "both" if here and (waiting := [name for name, task in tasks if not task.done()]):
                    house.tasks[waiting[step.which % len(waiting)]].cancel()  # and has not run since
                    await house.end(name := here[step.which % len(here)], step.tokens)
                    del house.tasks[name]
                case "grow":
                    house.workers.append((*house.workers[-1], Worker("w", "http://w", "m")))
                case "shrink" if len(house.workers[-1]) > 1:
                    house.workers.append(house.workers[-1][:-1])
            open_ = sum(t.done() and not t.cancelled() and not t.exception() for t in house.tasks.values())
            assert house.turns.depth == sum(not task.done() for task in house.tasks.values()) <= max_queue
            if step.verb != "grow" and house.turns.depth and max(map(len, house.workers)) == 1:
                assert open_ >= seats  # nobody waits beside a free seat
        waiting = house.turns.depth
        assert open_ or not waiting
        assert len(await house.drain()) == waiting
        assert house.turns.depth == 0

    run(test)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(1, 100)), min_size=20, max_size=80))
@settings(deadline=None, max_examples=40)
def test_while_tenants_wait_their_shares_differ_by_few_requests(asks: list[tuple[Anybody, int]]) -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        cost, left = {}, Counter[Anybody]()
        for i, (tenant, tokens) in enumerate(asks):
            await house.ask(f"{i}", tenant, tokens)
            cost[f"{i}"] = (tenant, tokens)
            left[tenant] += 1
        served = Counter[Anybody]()
        present = list(left)
        for name in await house.drain():
            tenant, tokens = cost[name]
            served[tenant] += tokens
            left[tenant] -= 1
            if not all(left[one] for one in present):
                break
            shares = [served[one] / one.weight for one in present]
            # SFQ's bound, one longest request of each, and the turns of the eldest: repaid by the next seven
            assert max(shares) - min(shares) <= 100 * 4

    run(test)


def test_the_whole_queue_is_served_within_the_bound_whatever_the_priorities() -> None:
    async def test() -> None:
        house = House()
        await house.ask("first")
        for i in range(3):
            await house.ask(f"later{i}", LATER)
        await house.end("first")
        served = 1
        while "later2" not in house.order:
            await house.ask(f"a{served}", A)
            await house.end(house.order[-1])
            served += 1
        assert served <= ELDEST_EVERY * 3 + 1

    run(test)
