"""A headless Chromium for the tests of this folder: `make browser` runs them.

They are left out where something is missing (requirements.py).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.requirements import AXE, PROGRAMS, ROOT, find_lack

SCREENSHOTS = ROOT / ".browser/screenshots"
collect_ignore_glob = ["test_*.py"] if find_lack() else []


class Page:
    """One page in the browser. `driver`: selenium's."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.path = driver, path

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        """The elements that are shown."""
        elements = self.driver.find_elements("css selector", selector)
        return [element for element in elements if element.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.find_all(selector)]

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        self.settle()

    def go(self, route: str) -> None:
        self.run("location.hash = arguments[0]", route)
        self.settle()

    def settle(self) -> None:
        """Waits until the page has drawn two frames."""
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(() => done())), 30)"
        )

    def resize(self, width: int, height: int) -> None:
        command = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", command)
        self.settle()

    def use_theme(self, theme: str) -> None:
        """The theme of the system, light or dark."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.settle()

    def console(self) -> list[str]:
        """The messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the browser requested since the last call, other than the page."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
        own = self.path.absolute().as_uri()
        return [url for url in addresses if not url.startswith(("data:", own))]

    def find_faults(self) -> list[str]:
        """What axe-core calls serious or critical."""
        if not self.run("return Boolean(window.axe)"):
            self.run(AXE.read_text(encoding="utf-8") + "; window.axe = axe")
        result = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(done)"
        )
        return [
            f"{fault['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
            for fault in result["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"][:3]
        ]

    def screenshot(self, name: str) -> Path:
        """Saves .browser/screenshots/NAME.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
        return SCREENSHOTS / f"{name}.png"


def run_influence(*arguments: object) -> None:
    command = [sys.executable, "-m", "influence_cli", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)


@pytest.fixture(scope="session")
def digits_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sample_runs/digits: pictures, influence over training, layers, self-influence, quality."""
    folder = tmp_path_factory.mktemp("digits")
    run, cache = "sample_runs/digits", folder / "cache"
    for name, flags in (
        ("scores", ()),
        ("steps", ("--by", "checkpoint")),
        ("layers", ("--by", "layer")),
    ):
        file = folder / f"{name}.parquet"
        run_influence("score", run, "--queries", "0:80", "--cache", cache, *flags, "-o", file)
    run_influence("self", run, "--top", "all", "--cache", cache, "-o", folder / "self.csv")
    (folder / "quality.csv").write_text(
        "method,protocol,figure,value,low,high,n,cost\n"
        "tracin,lds,spearman,0.18,0.13,0.23,30,40 trainings\n"
        "unroll,lds,spearman,0.97,0.96,0.98,30,40 trainings\n"
    )
    tables = [folder / f"{name}.parquet" for name in ("scores", "steps", "layers")]
    tables += [folder / "self.csv", folder / "quality.csv"]
    run_influence("report", *tables, "--run", run, "-o", folder / "digits.html")
    return folder / "digits.html"


@pytest.fixture(scope="session")
def words_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sample_runs/words: shaded words, and shaded tokens of another method."""
    folder = tmp_path_factory.mktemp("words")
    for method, part in (("tracin-we", "word"), ("tracin", "token")):
        flags = ("--method", method, "--by", part, "--queries", "0:40", "--top", 5)
        table, cache = folder / f"{part}.csv", folder / "cache"
        run_influence("score", "sample_runs/words", *flags, "--cache", cache, "-o", table)
    run_influence("report", folder / "word.csv", folder / "token.csv", "-o", folder / "words.html")
    return folder / "words.html"


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, PROGRAMS[0])))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    chromium.set_script_timeout(60)
    yield chromium
    chromium.quit()


@pytest.fixture
def open_page(driver: Any) -> Callable[..., Page]:
    """open_page(path, width, height, theme) -> the page, freshly loaded."""

    def open_file(path: Path, width: int = 1280, height: int = 900, theme: str = "light") -> Page:
        page = Page(driver, path)
        driver.get("about:blank")
        page.resize(width, height)
        page.use_theme(theme)
        page.console()
        page.requests()
        driver.get(path.absolute().as_uri())
        page.run("localStorage.clear()")
        page.settle()
        return page

    return open_file
