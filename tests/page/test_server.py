"""The pages in a real browser: one server, one headless Chromium, everything that people do there."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import Page, expect, sync_playwright

SECONDS = 300_000  # milliseconds: other work may keep both cores busy
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> <b>orb</b>"


@pytest.fixture(scope="module")
def roots(tiny_run, tmp_path_factory):
    """A folder with two finished runs."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("first", "second"):
        shutil.copytree(tiny_run, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(roots, tmp_path_factory):
    """The address and process of `excise ui`."""
    command = [sys.executable, "-m", "excise.cli", "ui", str(roots), "--no-browser"]
    place = tmp_path_factory.mktemp("cwd")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=place)
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    yield address, process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) in (130, -signal.SIGKILL)
    assert list(place.iterdir()) == []  # it leaves nothing where it was started


@pytest.fixture(scope="module")
def browser():
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    path = next(found, None)
    assert path, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(server, browser):
    """One tab; nothing may be loaded from elsewhere, and no script may fail or be refused."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    wrong, host = [], server[0].split("/")[2]
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.on(
        "request",
        lambda r: wrong.append(r.url) if r.url.startswith("http") and host not in r.url else None,
    )
    yield tab
    # Plotly says so of a figure that is taken away while its window changes; nothing is lost by it.
    assert [one for one in wrong if "displayed plot div" not in one] == []


def opened(page: Page, server, name: str) -> None:
    page.goto(server[0])
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    page.wait_for_selector(".js-plotly-plot .main-svg")


def status(address: str, **headers: str) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers)).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_answers_to_its_own_address_alone(server):
    address = server[0]
    base, token = address.rstrip("/").rsplit("/", 1)
    assert status(address) == 200
    assert status(f"{base}/") == 403
    assert status(f"{base}/{token[:-1]}/") == 403
    assert status(f"{base}/_nicegui_ws/socket.io/?EIO=4&transport=polling") == 403
    assert status(address, Host="evil.example") == 421
    assert status(address, Origin="http://evil.example") == 403
    for path in ("run/..%2f..%2fetc", "run/%2e%2e", "compare?runs=../../etc,..", "run/first"):
        assert status(f"{address}{path}") in (200, 404)  # of which the page says: no such run
    assert status(f"{address}_nicegui/../../../../etc/passwd") in (404, 200)


def test_a_run_is_shown_and_its_points_are_picked(page, server):
    opened(page, server, "first")
    expect(page.get_by_text("finished: 12 trials")).to_be_visible()
    page.get_by_label("Any trial").fill("3")
    expect(page.get_by_role("heading", name="Trial 3: complete")).to_be_visible()
    page.get_by_label("Any trial").fill("99")
    expect(page.get_by_text("There is no trial 99.")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en-US"
    for width in (375, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        # Figures follow the window a moment later.
        page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_base_and_two_trials_answer_side_by_side(page, server):
    opened(page, server, "first")
    for number in ("3", "5"):
        page.get_by_label("Any trial").fill(number)
        expect(page.get_by_role("heading", name=f"Trial {number}: complete")).to_be_visible()
        page.get_by_role("button", name="Add the point").click()
        expect(page.get_by_role("button", name=f"take trial {number} away")).to_be_visible()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_label("Message").fill(MARKUP)
    page.keyboard.press("Enter")
    replies = page.locator(".reply")
    expect(page.get_by_role("button", name="Again")).to_be_enabled()
    expect(replies).to_have_count(3)
    names = replies.get_by_role("heading").all_inner_texts()
    assert names == ["base", "trial 3", "trial 5"]
    expect(page.get_by_text(f"> {MARKUP}")).to_be_visible()  # as text
    page.reload()  # what was said lies on the server
    expect(page.locator(".reply")).to_have_count(3)
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("button", name="Again")).to_be_enabled()
    expect(page.locator(".reply")).to_have_count(3)
    page.get_by_role("button", name="New", exact=True).click()
    expect(page.locator(".reply")).to_have_count(0)


def test_runs_are_compared(page, server):
    page.goto(server[0])
    page.get_by_role("link", name="second", exact=True).wait_for()
    for box in page.get_by_role("checkbox").all():
        box.click()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("first: trial")).to_be_visible()
    expect(page.get_by_text("second: trial")).to_be_visible()


def test_a_point_is_exported_and_its_card_read(page, server, roots):
    opened(page, server, "second")
    expect(page.get_by_role("heading", name="Trial")).to_be_visible()
    page.get_by_label("Name of its folder").fill("../outside")
    page.get_by_role("button", name="Export the point").click()
    expect(page.get_by_text("give a plain name")).to_be_visible()
    page.get_by_label("Name of its folder").fill("exported")
    page.get_by_role("button", name="Export the point").click()
    page.get_by_role("button", name="Card of exported").click()
    expect(page.get_by_role("dialog")).to_contain_text("Model details")
    assert (roots / "exported" / "model.safetensors").exists()
    assert not (roots.parent / "outside").exists()
    page.get_by_role("button", name="Close").click()


def test_a_search_is_started_and_dies_with_the_server(page, server, roots):
    """The last one: it kills the server in the middle of the search that it started."""
    page.goto(server[0])
    page.get_by_label("Name of the run").fill("third")
    page.get_by_label("Model").fill("../../etc")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("the model must be")).to_be_visible()
    page.get_by_label("Model").fill("demo")
    page.get_by_label("Trials").fill("400")
    page.get_by_role("button", name="Start").click()
    page.get_by_role("link", name="third").click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.wait_for_function("document.body.innerText.includes(' of 400')")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_text("it can be resumed").first).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    page.goto("about:blank")
    server[1].kill()
    server[1].wait()
    assert (roots / "third" / "study.journal").exists()
    from excise.run_lock import is_held

    for _ in range(600):
        if not is_held(roots / "third"):
            break
        signal.sigtimedwait([], 0.1)
    assert not is_held(roots / "third")  # the search ended with it, and can be resumed
