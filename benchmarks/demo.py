"""
How long a visitor of the demo waits, in a headless Chromium that is open already:

    pip install ".[space]" selenium && python -m benchmarks.demo

First paint: from the start of `python examples/space/app.py` until the page shows its title. First answer: until the
answer to its first image stands there, torch's import and the model's loading included. Answers: from a click on
another sample until its answer is shown. Each repeat starts the page anew.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch

from benchmarks.measure import describe_run


APP = Path(__file__).parents[1] / "examples" / "space" / "app.py"
TITLE = "return document.querySelector('h1')?.innerText"
ANSWER = "return document.querySelector('#answer [data-accepted]')?.outerHTML"
LONGEST = 120  # seconds to wait for anything


def browser_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"{name}-browser")


@contextmanager
def browser(folder: Path):
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser_program("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={folder}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(condition: Callable[[], object], since: float) -> float:
    """Seconds since `since` at which `condition()` is true."""
    while not condition():
        if time.perf_counter() - since > LONGEST:
            raise TimeoutError(f"the page did not get there within {LONGEST} seconds")
        time.sleep(0.01)
    return time.perf_counter() - since


def is_listening(address: str) -> bool:
    try:
        with urlopen(address):
            return True
    except URLError:
        return False


def another_answer(driver, sample) -> float:
    """Seconds from a click on a sample until its answer is shown in place of the one before."""
    before, clicked = driver.execute_script(ANSWER), time.perf_counter()
    sample.click()
    return wait_for(lambda: driver.execute_script(ANSWER) not in (None, before), clicked)


def visit(driver, port: int) -> dict[str, list[float]]:
    """Seconds of each wait of one visit."""
    address = f"http://127.0.0.1:{port}"
    started = time.perf_counter()
    page = subprocess.Popen([sys.executable, str(APP), "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: is_listening(address), started)
        driver.get(address)
        seconds = {"first paint": [wait_for(lambda: driver.execute_script(TITLE), started)]}
        seconds["first answer"] = [wait_for(lambda: driver.execute_script(ANSWER), started)]
        samples = driver.find_elements("css selector", "#samples button.gallery-item")[1:6]
        seconds["answer to another sample"] = [another_answer(driver, sample) for sample in samples]
        return seconds
    finally:
        page.terminate()
        page.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=7870)
    arguments = parser.parse_args()
    print(describe_run(torch.device("cpu"), "float32"))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as driver:
        for repeat in range(arguments.repeats):
            for name, seconds in visit(driver, arguments.port + repeat).items():
                found.setdefault(name, []).extend(seconds)
    print("\n| | seconds, median | range |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
