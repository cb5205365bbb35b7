"""The status page in headless Chromium: what it shows, at two widths, in light and dark, and that it asks nobody else.

Set DUOSERVE_SHOTS to a folder to keep pictures.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.server.fake_service import hoped, spoken
from tests.server.test_metrics_and_status import some_stats

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def busy(served):
    """A server that has served two requests and runs a third."""
    endless = [spoken("a", "b")[0], 60.0, *spoken("never")]
    server = served(lambda number: [0.03, *spoken("a", "b")], objectives=hoped(0.01, 1.0))
    server.service.stats = some_stats()
    server.complete()
    server.complete(slo_ttft_ms=5000)
    server.service.script = lambda number: endless
    return server


def opened(browser, url, width, scheme="light", **options):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    page = context.new_page()
    page.faults, page.asked = [], []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    expect(page.locator("#state")).not_to_have_text("connecting")
    return page


def text(page, name):
    return page.locator(f"#{name}").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_shows_the_service(browser, busy, width, scheme):
    page = opened(browser, busy.url, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.locator("section").all():
        bounds = box.bounding_box()
        assert bounds["x"] >= 0 and bounds["x"] + bounds["width"] <= width
        assert box.evaluate("node => node.scrollWidth <= node.clientWidth"), box.inner_text()
    columns = len({round(box.bounding_box()["x"]) for box in page.locator(".cards section").all()})
    assert columns == (1 if width == 390 else 4)
    assert (text(page, "model"), text(page, "state"), text(page, "running")) == ("fake", "ready", "0")
    assert (text(page, "hits"), text(page, "slo"), text(page, "stall")) == ("72.1 %", "80.0 %", "25.0 %")
    assert "objective\u00a010\u00a0ms" in text(page, "ttftmore")  # no unit on a line of its own
    assert "bad" in page.locator("#ttft").get_attribute("class")
    assert "good" in page.locator("#tpot").get_attribute("class")
    assert page.locator("#requests tr").count() == 2
    assert "missed" in page.locator("#requests").inner_text() and "met" in page.locator("#requests").inner_text()
    assert page.faults == [] and all(url.startswith(busy.url) for url in page.asked)
    if folder := os.environ.get("DUOSERVE_SHOTS"):
        page.wait_for_timeout(2500)
        page.screenshot(path=Path(folder) / f"status-{width}-{scheme}.png", full_page=True)
    page.context.close()


def test_text_stands_out_from_its_ground_in_both_schemes(browser, busy):
    for scheme in ("light", "dark"):
        page = opened(browser, busy.url, 1280, scheme)
        for name in ("model", "about", "ttft", "tpot", "state"):
            assert page.evaluate(CONTRAST, name) >= 4.5, (scheme, name)
        page.context.close()


CONTRAST = """name => {
  const light = css => {
    const linear = v => v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = css.match(/[\\d.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const node = document.getElementById(name);
  const ground = getComputedStyle(node.closest("section") || document.body).backgroundColor;
  const [a, b] = [light(getComputedStyle(node).color), light(ground)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


def test_it_is_live(browser, busy):
    page = opened(browser, busy.url, 1280)
    with busy.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        lines = answer.iter_lines()  # kept: when it goes, so does the connection
        next(lines)
        expect(page.locator("#running")).to_have_text("1")
        busy.service.stats.bytes.demanded += 50_000_000
        expect(page.locator("#link")).to_contain_text("MB/s")
    assert "running" in page.locator("#requests").inner_text()
    expect(page.locator("#running")).to_have_text("0")
    page.context.close()


def test_it_says_when_the_server_is_gone(browser, busy):
    page = opened(browser, busy.url, 390)
    busy.stop()
    expect(page.locator("#state")).to_have_text("not reachable")
    page.context.close()


def test_a_key_is_asked_for_as_a_password(browser, served):
    server = served(api_key="s3cret")
    page = opened(browser, server.url, 390, http_credentials={"username": "me", "password": "s3cret"})
    assert text(page, "state") == "ready"
    page.context.close()


def test_a_models_name_is_text_and_no_markup(browser, served):
    page = opened(browser, served(name="<img src=x onerror=alert(1)>").url, 390)
    assert text(page, "model") == "<img src=x onerror=alert(1)>" and page.faults == []
    page.context.close()
