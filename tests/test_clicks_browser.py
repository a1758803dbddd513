"""The panel as a person has it: JupyterLab with its kernel, and a browser that clicks and types.

It needs the package playwright, and Chromium or Chrome on the PATH; else it is skipped.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

from rlhf_helpers.clicks import Clicks

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: pip install playwright"
)

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(BROWSERS)}")

TIMEOUT = 60_000  # milliseconds, for a busy machine; all of it takes half a minute
PAIRS = [(f"what is {n} plus {n}?", f"<b>{2 * n}</b>.", "I $never$ know.") for n in range(10)]
REPEATS = 2
CELL = f"""from rlhf_helpers.clicks import Clicks
from rlhf_helpers.clicks_panel import show

show(Clicks({PAIRS!r}, "clicks.jsonl", repeats={REPEATS}))"""
QUIET = (
    "--no-browser",
    "--allow-root",
    "--ServerApp.port_retries=0",
    "--LabApp.extension_manager=readonly",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.news_url=None",
)


@pytest.fixture
def lab(tmp_path):
    """The address at which JupyterLab serves a notebook of `tmp_path`."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(CELL)]
    nbformat.write(notebook, tmp_path / "clicks.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    own += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(tmp_path / "jupyter" / name) for name in own}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "jupyterlab", *QUIET, f"--ServerApp.root_dir={tmp_path}"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}"]
    log = tmp_path / "jupyter.log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/doc/tree/clicks.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url, server, log):
    for _ in range(TIMEOUT // 200):
        assert server.poll() is None, log.read_text("utf-8")
        try:
            return urlopen(url).close()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text("utf-8"))


@pytest.fixture
def page():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER)
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.set_default_timeout(TIMEOUT)
        yield page
        browser.close()


def run_the_cell(page, done):
    """Run it once the kernel is there; if it is not yet, JupyterLab asks which one is meant."""
    page.wait_for_selector("text=/ipykernel.*Idle/")
    asked, prompt = page.locator(".jp-Dialog .jp-mod-accept"), page.locator(".jp-InputPrompt").first
    for _ in range(TIMEOUT // 2000):
        (asked if asked.count() else page.locator('[data-jp-item-name="run"]')).click()
        page.wait_for_timeout(2000)
        if re.search(r"[*\d]", prompt.inner_text()):
            break
    shows(page, done)


def shows(page, done):
    """Wait until the panel counts so many choices, then as long as a person takes at least."""
    text = f"{done} of {len(PAIRS) + REPEATS} done"
    playwright.expect(page.locator(".rlhf-clicks")).to_contain_text(text, timeout=TIMEOUT)
    page.wait_for_timeout(400)


def saved(folder):
    """The sides in order, as both files have them."""
    rows = [
        json.loads(line)
        for file in folder.glob("*.jsonl")
        for line in file.read_text("utf-8").splitlines()
    ]
    return [row["side"] for row in sorted(rows, key=lambda row: row["number"])]


def test_ten_clicks_a_reload_and_an_undo(page, lab, tmp_path):
    page.goto(lab)
    run_the_cell(page, done=0)
    card = page.locator(".rlhf-clicks").inner_text()
    assert "<b>0</b>." in card and "I $never$ know." in card  # markup is shown as text

    sides = []
    ways = [".rlhf-first", ".rlhf-second", "ArrowLeft", "ArrowRight", "ArrowDown"]
    ways += ["1", "2", "0", ".rlhf-neither", ".rlhf-second"]
    meant = ["first", "second", "first", "second", None, "first", "second", None, None, "second"]
    for way, side in zip(ways, meant, strict=True):
        page.click(way) if way.startswith(".") else page.keyboard.press(way)
        sides.append(side)
        shows(page, len(sides))
        assert saved(tmp_path) == sides

    page.reload()
    run_the_cell(page, done=10)
    page.click(".rlhf-first")
    shows(page, 11)
    page.keyboard.press("u")
    shows(page, 10)
    assert saved(tmp_path) == sides
    page.keyboard.press("ArrowRight")
    shows(page, 11)
    page.keyboard.press("1")
    shows(page, 12)
    assert "You agreed with yourself in" in page.locator(".rlhf-clicks").inner_text()
    assert not page.locator(".rlhf-first").is_visible()

    sides += ["second", "first"]
    assert saved(tmp_path) == sides
    clicks = Clicks(PAIRS, tmp_path / "clicks.jsonl", repeats=REPEATS)
    assert [row["side"] for row in clicks.rows] == sides
    assert {row["by"] for row in clicks.rows} == {"person"}
    assert all(row["seconds"] > 0.3 for row in clicks.rows)
