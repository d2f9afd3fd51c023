"""The page in a real browser: headless Chromium, from a file, without a network."""

from __future__ import annotations

import os
import shutil

import pytest

from samestep.launcher.report import command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and chromedriver"),
]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1360,1000"
)
SETTLED = "return document.documentElement.dataset.drawn === 'yes'"
DRAWN = """
return [...document.querySelectorAll('.chart')].map(chart => [
    chart.closest('figure').querySelector('h2').textContent,
    chart.querySelectorAll('.trace path, .points path, .fills path').length,
])"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    """One run, and three runs together: one of them failed, one lost its loss."""
    folder = tmp_path_factory.mktemp("runs")
    whole = made.run(folder / "whole", made.events(100))
    failed = made.events(100, crash_after=50)
    failed = failed[: 1 + [event["event"] for event in failed].index("worker_failed")]
    other = made.events(100)
    for event in other:
        if event.get("step") == 40 and event["event"] == "step":
            event |= {"loss": None, "loss_hex": "nan"}
    runs = [whole, made.run(folder / "failed", failed, {"seed": 1}), made.run(folder / "other", other)]
    return {
        "one": command.command([str(whole)]),
        "many": command.command([*map(str, runs), "--output", str(folder / "many.html")]),
    }


def opened(browser, page, scheme="light"):
    from selenium.webdriver.support.ui import WebDriverWait

    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(SETTLED))
    save = os.environ.get("SAMESTEP_SCREENSHOTS")  # a folder: for people who want to look
    if save:
        browser.save_screenshot(f"{save}/{page.stem}-{scheme}.png")
    return browser


def settle(browser):
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "many"])
def test_every_chart_is_drawn_and_the_console_stays_empty(name, scheme, browser, pages):
    opened(browser, pages[name], scheme)
    drawn = browser.execute_script(DRAWN)
    assert len(drawn) >= 7
    assert [title for title, paths in drawn if not paths] == []
    assert browser.get_log("browser") == []
    sent = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert browser.execute_script(sent) == 0


def test_a_drag_zooms_and_a_double_click_goes_back(browser, pages):
    from selenium.webdriver.common.action_chains import ActionChains

    opened(browser, pages["one"])
    area = browser.find_element("css selector", "#chart-0 .nsewdrag")
    extent = "return document.getElementById('chart-0')._fullLayout.xaxis.range.map(Number)"
    whole = browser.execute_script(extent)
    ActionChains(browser).move_to_element(area).click_and_hold().move_by_offset(200, 0).release().perform()
    settle(browser)
    zoomed = browser.execute_script(extent)
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    ActionChains(browser).move_to_element(area).double_click().perform()
    settle(browser)
    assert browser.execute_script(extent) == whole


def test_the_legend_hides_and_shows_a_run(browser, pages):
    opened(browser, pages["many"])
    hidden = "return document.getElementById('chart-0').data.filter(t => t.visible === 'legendonly').map(t => t.name)"
    toggle = browser.find_element("css selector", "#chart-0 .legendtoggle")
    toggle.click()
    browser.execute_async_script("setTimeout(arguments[0], 700)")  # plotly waits for a second click that long
    assert "whole" in browser.execute_script(hidden)
    browser.find_element("css selector", "#theme").click()  # another theme shows nothing again
    settle(browser)
    assert "whole" in browser.execute_script(hidden)
    browser.find_element("css selector", "#chart-0 .legendtoggle").click()
    browser.execute_async_script("setTimeout(arguments[0], 700)")
    assert browser.execute_script(hidden) == []


def test_the_x_axis_is_steps_samples_or_time(browser, pages):
    opened(browser, pages["one"])
    read = "const c = document.getElementById('chart-0'); return [c._fullLayout.xaxis.title.text, c.data[0].x[9]]"
    found = {}
    for axis in ("samples", "seconds", "steps"):
        browser.find_element("css selector", f"[data-axis={axis}]").click()
        settle(browser)
        found[axis] = browser.execute_script(read)
    assert found == {
        "samples": ["samples", 640],
        "seconds": ["seconds since the start", 1],
        "steps": ["optimizer step", 10],
    }


def test_the_y_axis_of_losses_may_be_logarithmic(browser, pages):
    opened(browser, pages["one"])
    read = "return document.getElementById('chart-0')._fullLayout.yaxis.type"
    browser.find_element("css selector", "button.log").click()
    settle(browser)
    assert browser.execute_script(read) == "log"


def contrast(browser, selector):
    """WCAG 2.2's ratio of an element's text to the ground behind it, 1 to 21."""
    colours = browser.execute_script(
        """
        const element = document.querySelector(arguments[0]);
        const style = getComputedStyle(element);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        const numbers = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
        const ink = element instanceof SVGElement ? style.fill : style.color;
        return [numbers(ink), numbers(getComputedStyle(behind).backgroundColor)];
        """,
        selector,
    )

    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_themes_and_the_switch_overrules_the_system(scheme, browser, pages):
    opened(browser, pages["many"], scheme)
    places = ["h1", "h2", ".note", ".verdict", ".settings th", "tr.differs td", ".is-failed", ".is-finished"]
    places += ["#chart-0 .xtick text", "#chart-0 .legendtext", "#axis button"]
    assert {place: ratio for place in places if (ratio := contrast(browser, place)) < 4.5} == {}
    browser.find_element("css selector", "#theme").click()
    settle(browser)
    theme = browser.execute_script("return document.documentElement.dataset.theme")
    assert theme != scheme
    assert {place: ratio for place in places if (ratio := contrast(browser, place)) < 4.5} == {}


def test_equal_settings_can_be_hidden(browser, pages):
    opened(browser, pages["many"])
    count = "return [...document.querySelectorAll('.settings tbody tr')].filter(r => r.offsetParent).length"
    before = browser.execute_script(count)
    browser.find_element("css selector", "#differences").click()
    assert 1 == browser.execute_script(count) < before
