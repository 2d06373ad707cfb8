"""The dashboard in a real browser, in front of a fleet under load.  Pictures are kept in out/dashboard/."""

import asyncio
import contextlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect
from typer.testing import CliRunner

from gateway.app import create_app
from gateway.cli import app as cli
from gateway.config import GatewayConfig
from gateway.dashboard_view import FILES, MAX_PREFIXES, heat
from loadtests.demo import Worker, fleet, load
from tests.browser import chromium
from tests.fakes import FakeVLLM, serve, wait_until
from tests.servers import Server, free_port

pytestmark = pytest.mark.e2e

PICTURES = Path("out") / "dashboard"
SECONDS = 30_000.0  # patience, in playwright's milliseconds
STATE = "**/admin/state*"
HOSTILE = '<img src=x onerror="window.owned=1"><script>window.owned=1</script>'
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        browser.new_context().close()
        yield browser


@pytest.fixture(scope="module")
def busy(smollm_path: Path) -> Iterator[tuple[str, list[Worker]]]:
    """A gateway under a little load, and its three workers."""
    folder = tempfile.TemporaryDirectory(prefix="cairn-")
    with folder as path, contextlib.ExitStack() as opened:
        valkey = Server(Path(path))
        opened.callback(valkey.kill)
        valkey.start()
        url, workers = opened.enter_context(fleet(valkey.url, smollm_path, workers=3))
        wait_until(lambda: httpx.get(f"{url}/health/ready", trust_env=False).status_code == 200, 60)
        enough = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(load(url, lambda: not enough.is_set(), rate=8)))
        thread.start()
        opened.callback(thread.join)
        opened.callback(enough.set)
        with httpx.Client(base_url=url, trust_env=False) as client:
            wait_until(lambda: client.get("/admin/state").json()["headline"]["requests"] > 30, 60)
        yield url, workers


@pytest.fixture
def idle() -> Iterator[tuple[str, FakeVLLM]]:
    worker = FakeVLLM()
    with serve(worker) as at, serve(create_app(GatewayConfig(workers=[f"fake={at}"]))) as url:
        yield url, worker


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Pages that must not complain, nor ask anybody but the gateway."""
    troubles: list[str] = []
    with contextlib.ExitStack() as contexts:

        def visit(url: str, *, before: Callable[[Page], object] = lambda page: None, **context: Any) -> Page:
            made = browser.new_context(**{"viewport": DESK, "reduced_motion": "reduce", **context})
            contexts.callback(made.close)
            page = made.new_page()
            page.set_default_timeout(SECONDS)
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
            page.on(
                "request", lambda asked: None if asked.url.startswith(url) else troubles.append(asked.url)
            )
            before(page)
            page.goto(f"{url}/dashboard")
            return page

        yield visit
    # a refused or dropped poll is written to the console by the browser itself
    assert [trouble for trouble in troubles if "Failed to load resource" not in trouble] == []


def picture(page: Page, name: str, *, whole: bool = True) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=PICTURES / f"{name}.png", full_page=whole)


def accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def live(page: Page) -> Page:
    expect(page.locator("#live")).to_have_attribute("data-state", "live", timeout=SECONDS)
    return page


def fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_receipt_opens_by_keyboard_and_gives_the_focus_back(
    busy: tuple[str, list[Worker]], opened: Open
) -> None:
    page = live(opened(busy[0]))
    expect(page.locator("#flow tbody tr", has_text="hit").first).to_be_visible()
    page.get_by_role("button", name="Pause").click()  # or the row may be gone when the receipt is closed
    hit = page.locator("#flow tbody tr", has_text="hit").first.locator(".pick")
    hit.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#receipt tbody th").first).to_be_visible()
    expect(page.locator("#receipt")).to_contain_text("it holds part of the prompt")
    expect(page.get_by_role("heading", name="Receipt")).to_be_focused()
    expect(page.locator("#receipt tbody th").first).to_contain_text("chosen")
    accessible(page)
    picture(page, "receipt")
    page.keyboard.press("Escape")
    expect(hit).to_be_focused()
    expect(page.locator("#receipt")).to_contain_text("Choose a request")


def test_draining_asks_first_and_resuming_takes_it_back(busy: tuple[str, list[Worker]], opened: Open) -> None:
    page = live(opened(busy[0]))
    state = page.locator("#workers tbody tr", has_text="w2").locator(".state")
    page.get_by_role("button", name="Drain w2").click()
    accessible(page)
    page.get_by_role("button", name="Cancel").click()
    expect(state).to_have_text("ready")
    page.get_by_role("button", name="Drain w2").click()
    picture(page, "confirm", whole=False)
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(state).to_have_text(re.compile("drain(ed|ing)"), timeout=SECONDS)
    expect(page.locator("#says")).to_contain_text("w2 is drain", timeout=SECONDS)
    rows = httpx.get(f"{busy[0]}/admin/workers", trust_env=False).json()["workers"]
    assert ["drain" in row["state"] for row in rows] == [False, True, False]
    picture(page, "drained")
    page.get_by_role("button", name="Resume w2").click()
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    expect(state).to_have_text("ready", timeout=SECONDS)


def test_a_chart_is_also_a_table(busy: tuple[str, list[Worker]], opened: Open) -> None:
    page = live(opened(busy[0]))
    page.locator("#chart-hits summary").click()
    table = page.get_by_role("table", name="Prompt tokens found, by tier, minute by minute")
    expect(table.get_by_role("columnheader")).to_have_text(["Minute", "device", "host", "disk", "shared"])
    expect(table.get_by_role("row").nth(1).get_by_role("cell").first).to_have_text(re.compile(r"\d+ %|–"))
    page.locator("#chart-ttft svg").hover()
    accessible(page)


def test_nobody_there_yet(opened: Open) -> None:
    with serve(create_app(GatewayConfig())) as url:
        page = live(opened(url))
        expect(page.get_by_text("No worker yet.")).to_be_visible()
        expect(page.get_by_text("No request yet.")).to_contain_text(f"{url}/v1")
        expect(page.locator("#chart-hits")).to_contain_text("Nothing yet")
        accessible(page)
        picture(page, "empty")


def test_a_worker_that_is_down_says_so_in_words(idle: tuple[str, FakeVLLM], opened: Open) -> None:
    url, worker = idle
    page = live(opened(url))
    expect(page.locator("#workers .state")).to_have_text("ready")
    worker.healthy = False
    expect(page.locator("#workers .state")).to_have_text("down", timeout=SECONDS)
    expect(page.locator("#says")).to_contain_text("is down")
    accessible(page)
    picture(page, "down")


def test_a_gateway_that_stops_answering_is_admitted_and_a_paused_page_asks_nothing(
    idle: tuple[str, FakeVLLM], opened: Open
) -> None:
    page = live(opened(idle[0], before=lambda page: page.clock.install()))
    page.route(STATE, lambda route: route.abort())
    page.clock.fast_forward(7000)
    expect(page.locator("#live")).to_have_text("Not answering", timeout=SECONDS)
    expect(page.locator("#notice")).to_contain_text("does not answer")
    accessible(page)
    picture(page, "stale")
    page.unroute(STATE)
    page.clock.fast_forward(3000)
    live(page)
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#live")).to_have_text("Paused")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    page.get_by_role("button", name="Pause").click()
    live(page)


def test_the_token_stays_in_the_tab_and_travels_in_a_header(idle: tuple[str, FakeVLLM], opened: Open) -> None:
    def door(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "Incorrect admin token"}})

    page = opened(idle[0], before=lambda page: page.route("**/admin/**", door))
    dialog = page.get_by_role("dialog", name="Admin token")
    expect(dialog).to_be_visible()
    accessible(page)
    picture(page, "token", whole=False)
    dialog.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("not accepted")
    dialog.get_by_label("Token").fill("right")
    page.keyboard.press("Enter")
    live(page)
    kept = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage) + document.cookie]")
    assert ["right" in each for each in kept] == [True, False]
    page.get_by_role("button", name="Forget token").click()
    expect(dialog).to_be_visible()
    assert "right" not in page.evaluate("JSON.stringify(sessionStorage)")


@pytest.mark.parametrize(("scheme", "view"), [("light", DESK), ("dark", DESK), ("light", PHONE)])
def test_a_fleet_under_load_is_shown_whole_in_any_light_and_width(
    busy: tuple[str, list[Worker]], opened: Open, scheme: str, view: dict[str, int]
) -> None:
    page = live(opened(busy[0], color_scheme=scheme, viewport=view))
    expect(page.locator("#workers tbody tr")).to_have_count(3)
    expect(page.locator("#workers tbody tr").first).to_contain_text("of 96")
    expect(page.locator("#flow tbody tr")).to_have_count(40, timeout=SECONDS)
    assert 1 <= page.locator("#heat tbody tr").count() <= MAX_PREFIXES
    expect(page.locator("#heat tbody tr").first).to_contain_text("device")
    for path in ("#chart-hits path.area", "#chart-ttft path.line.hit", "#chart-rate path.line.ok"):
        expect(page.locator(path).first).to_have_attribute("d", re.compile("M.*L"), timeout=SECONDS)
    expect(page.locator("#chart-hits svg")).to_have_attribute("aria-label", re.compile("device \\d+ %"))
    expect(page.locator('[data-tile="hits"]')).to_have_text(re.compile("\\d+%"))
    fits(page)
    accessible(page)
    picture(page, f"busy-{scheme}-{view['width']}")
    if view is PHONE:
        the_receipt_is_a_sheet_that_closes(page)


def the_receipt_is_a_sheet_that_closes(page: Page) -> None:
    expect(page.locator("#receipt")).to_be_hidden()
    page.locator("#flow tbody .pick").first.click()
    expect(page.locator("#receipt tbody th").first).to_be_visible()
    fits(page)
    accessible(page)
    picture(page, "receipt-phone", whole=False)
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#receipt")).to_be_hidden()


TENANT = {
    "tenant": "team-a", "requests": 12, "prompt_tokens": 9000, "completion_tokens": 1000,
    "refused": {"rpm": 3}, "inflight": 2, "month_tokens": 10_000, "keys": [
        {"rpm": 60, "tpm": 0, "tokens_per_month": 50_000, "requests_left": 48, "tokens_left": None},
        {"rpm": 0, "tpm": 0, "tokens_per_month": 0, "requests_left": None, "tokens_left": None},
    ],
}  # fmt: skip


def test_tenants_are_shown_with_what_they_used_of_their_limits(
    idle: tuple[str, FakeVLLM], opened: Open
) -> None:
    def usage(page: Page) -> None:
        page.route("**/admin/tenants", lambda route: route.fulfill(json={"tenants": [TENANT]}))

    page = live(opened(idle[0], before=usage))
    row = page.get_by_role("row", name="team-a")
    expect(row.get_by_role("cell")).to_have_text(
        ["12", "10K", "3", "2", "12 of 60", "no limit", "10K of 50K"], timeout=SECONDS
    )
    accessible(page)
    picture(page, "tenants")


def test_the_rows_of_tenants_are_those_the_gateway_tells_on_a_port_of_its_own(
    opened: Open, tmp_path: Path
) -> None:
    store, port = str(tmp_path / "keys.yaml"), free_port()
    create = (
        "keys",
        "create",
        "--tenant",
        "team-a",
        "--file",
        store,
        "--rpm",
        "2",
        "--tokens-per-month",
        "9000",
    )
    with ThreadPoolExecutor(1) as away:  # from playwright's event loop
        made = [away.submit(CliRunner().invoke, cli, create).result().stdout.strip() for _ in range(2)]
    worker = FakeVLLM()
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    with serve(worker) as at:
        config = GatewayConfig(
            workers=[f"fake={at}"], auth="keys", keys_file=store, port=8765, admin_port=port
        )
        with serve(create_app(config)) as url:
            pages = f"http://127.0.0.1:{port}"
            page = live(opened(pages))
            expect(page.get_by_text("No request yet.")).to_contain_text("http://127.0.0.1:8765/v1")
            for key in (*made, made[0], made[0]):
                known = {"authorization": f"Bearer {key}"}
                httpx.post(
                    f"{url}/v1/chat/completions", json=body, headers=known, trust_env=False, timeout=30
                )
            told = httpx.get(f"{pages}/admin/tenants", trust_env=False).json()
            page.reload()
            row = page.get_by_role("row", name="team-a")
            expect(row.get_by_role("cell")).to_have_text(
                ["4", "36", "1", "0", re.compile("[0-3] of 4"), "no limit", "36 of 9,000"], timeout=SECONDS
            )
    assert told["tenants"][0]["keys"][0]["tpm"] == 0
    assert TENANT.keys() == told["tenants"][0].keys()
    assert TENANT["keys"][0].keys() <= told["tenants"][0]["keys"][0].keys()


def poisoned(value: Any) -> Any:
    """The same document with every text, names of dictionaries apart, followed by a script."""
    if isinstance(value, dict):
        return {name: poisoned(each) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_name_is_ever_markup(busy: tuple[str, list[Worker]], opened: Open) -> None:
    def poison(route: Route) -> object:
        if route.request.url.endswith("/admin/tenants"):
            return route.fulfill(json={"tenants": [{**TENANT, "tenant": HOSTILE}]})
        document = poisoned(route.fetch().json())
        document["errors"] = [{"kind": HOSTILE, "count": 1, "last_at": 1.0}]
        document["removed"] = [HOSTILE]
        for worker in document["workers"]:
            worker["adapters"] = [HOSTILE]
        return route.fulfill(body=json.dumps(document), content_type="application/json")

    page = opened(busy[0], before=lambda page: page.route("**/admin/**", poison))
    expect(page.locator("#workers tbody tr")).to_have_count(3)
    page.locator("#flow tbody .pick").first.click()
    expect(page.locator("#receipt tbody th").first).to_contain_text(HOSTILE)
    page.get_by_role("button", name="Drain w1").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    for place in ("#workers", "#flow", "#heat", "#errors", "#tenants", "#receipt", "#about", "#workers-note"):
        expect(page.locator(place)).to_contain_text(HOSTILE)
    assert page.evaluate("window.owned") is None
    assert page.locator("img").count() == 1  # our mark
    assert page.locator("script").count() == 1


def test_an_adapters_hostile_name_comes_from_a_worker_and_stays_text(
    idle: tuple[str, FakeVLLM], opened: Open
) -> None:
    url, worker = idle
    worker.adapters = [HOSTILE]
    with serve(create_app(GatewayConfig(workers=[f"fake={worker_url(url)}"]))) as fresh:
        page = live(opened(fresh))
        expect(page.locator("#workers")).to_contain_text(HOSTILE, timeout=SECONDS)
        body = {"model": HOSTILE, "prompt": "x"}
        assert httpx.post(f"{fresh}/v1/completions", json=body, trust_env=False).status_code == 200
        expect(page.locator("#flow")).to_contain_text(HOSTILE, timeout=SECONDS)
        assert page.evaluate("window.owned") is None


def worker_url(gateway: str) -> str:
    rows = httpx.get(f"{gateway}/admin/workers", trust_env=False).json()["workers"]
    return str(rows[0]["url"])


def test_the_pages_own_files_are_all_there_is_and_nothing_else_may_run() -> None:
    with serve(create_app(GatewayConfig())) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for path in [f"/dashboard/{file.name}" for file in FILES.iterdir() if file.suffix != ".html"] + [
            "/dashboard"
        ]:
            reply = client.get(path)
            assert reply.status_code == 200, path
            assert reply.headers["content-security-policy"].startswith("default-src 'self';")
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"https?://(?!www.w3.org/2000/svg)", reply.text), path
        for path in ("/dashboard/index.html", "/dashboard/..%2fadmin.py", "/dashboard/none.js"):
            assert client.get(path).status_code == 404, path
        assert client.get("/admin/decisions/7").status_code == 404
        assert client.get("/admin/state?since=x").status_code == 400


def test_a_receipt_adds_up_and_begins_with_who_was_chosen(idle: tuple[str, FakeVLLM]) -> None:
    with httpx.Client(base_url=idle[0], trust_env=False) as client:
        assert client.post("/v1/completions", json={"model": "fake", "prompt": "x"}).status_code == 200
        (brief,) = client.get("/admin/state").json()["decisions"]
        found = client.get(f"/admin/decisions/{brief['turn']}").json()
    assert found["workers"][0]["worker"] == brief["answered_by"] == found["worker"]
    assert brief["ttft_ms"] > 0
    for row in found["workers"]:
        assert sum(row["terms_ms"].values()) == pytest.approx(row["total_ms"], abs=0.01)


def test_another_life_gets_the_whole_series_and_a_poll_of_the_same_only_news(
    idle: tuple[str, FakeVLLM],
) -> None:
    with httpx.Client(base_url=idle[0], trust_env=False) as client:
        first = client.get("/admin/state").json()
        ask = {"since": first["series"]["next"], "life": first["life"]}
        same = client.get("/admin/state", params=ask).json()["series"]
        other = client.get("/admin/state", params={**ask, "since": 10**6, "life": "another"}).json()["series"]
    assert same["first"] == ask["since"]
    assert other["first"] == 0


def test_heat_is_who_was_asked_for_most_and_what_each_held_then() -> None:
    def decision(prefixes: dict[str, int], hit: list[int]) -> dict[str, Any]:
        candidates = [{"worker": "w1", "hit": hit}, {"worker": "w2", "hit": [0, 0, 0, 0]}]
        return {"prefixes": prefixes, "candidates": candidates, "prompt_tokens": 100, "model": "m"}

    found = heat(
        [
            decision({"once": 16}, [0, 0, 0, 0]),
            *[decision({"system": 32, "document": 48}, [16, 0, 32, 0])] * 2,
            decision({"system": 32, "other": 48}, [16, 8, 0, 40]),
        ]
    )
    assert found["decisions"] == 4
    system, document = found["prefixes"]
    assert (system["key"], system["requests"], system["common"], system["tokens"]) == ("system", 3, True, 32)
    assert system["holders"] == [
        {"worker": "w1", "tokens": {"device": 16, "host": 8, "disk": 0, "shared": 8}}
    ]
    assert (document["key"], document["requests"], document["common"], document["tokens"]) == (
        "document",
        2,
        False,
        100,
    )
    assert document["holders"] == [
        {"worker": "w1", "tokens": {"device": 16, "host": 0, "disk": 32, "shared": 0}}
    ]
