"""
A load test of `examples/serve.py` over loopback:

    python -m benchmarks.service --model outputs/openvino --clients 16 --requests 2000

The server runs in a process of its own. It is asked for each image once, alone, without τ and with a τ at which every
image must exit at the first and at the last stage. Then every client sends one image after another over one connection,
good and bad ones, with and without τ; a 503 is asked again after `Retry-After`. A request is lost if it has no answer,
or one of another status, stage or image: each is compared with that of the same image alone, up to `--tolerance`.
At the end the server gets SIGTERM after it has begun to read requests: each of them must be answered. Exits with 1 if
any request is lost. `--model` is a folder, saved or exported.
"""

import argparse
import io
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedConfig

from benchmarks.measure import describe_run
from hf_thinkingvit.auto import AutoConfig
from hf_thinkingvit.models.configuration_staged import thinks_in_stages
from hf_thinkingvit.models.exit_criteria import EXIT_CRITERIA


SERVER = Path(__file__).parents[1] / "examples" / "serve.py"
IMAGES = 20  # that differ
PATIENCE = 120  # seconds for which a request is asked again while the server is full
Answer = dict[str, Any]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(content, "jpeg")
    return content.getvalue()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def ready(port: int, server: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("the server did not start")


def stages_of_queries(config: PreTrainedConfig) -> dict[str, int | None]:
    """The queries that clients use, with the stage at which every image must exit; `None` where it may be any."""
    if not thinks_in_stages(config):
        return {"": 0}
    first_and_last = (0, config.num_stages - 1)
    at_great, at_zero = first_and_last if EXIT_CRITERIA[config.exit_criterion].exits_below else first_and_last[::-1]
    return {"": None, "?threshold=0": at_zero, "?threshold=99": at_great}


def ask(connection: HTTPConnection, query: str, body: bytes) -> tuple[int, bytes, float]:
    """The status and the content of an answer, and for a 503 the seconds after which to ask again."""
    connection.request("POST", f"/classify{query}", body)
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, content, float(answer.headers["Retry-After"]) if answer.status == 503 else 0.0


def difference(answer: Answer, expected: Answer, tolerance: float) -> str | None:
    """What tells an answer from the expected one; `None` if nothing but rounding does."""
    try:
        if answer["exit_stage"] != expected["exit_stage"]:
            return f"stage {answer['exit_stage']} instead of {expected['exit_stage']}"
        scores, others = ([entry["score"] for entry in one["labels"]] for one in (answer, expected))
        pairs = zip([answer["entropy"], *scores], [expected["entropy"], *others], strict=True)
        if any(abs(value - other) > tolerance for value, other in pairs):
            return f"entropy {answer['entropy']} and scores {scores} instead of {expected['entropy']} and {others}"
        # Of two scores that are nearly equal, either may be the greater one.
        label, likely = answer["labels"][0]["label"], others[0] - 2 * tolerance
        if label not in [entry["label"] for entry in expected["labels"] if entry["score"] >= likely]:
            return f"label {label!r} instead of {expected['labels'][0]['label']!r}"
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return f"no answer of the service ({error!r}): {str(answer)[:200]}"
    return None


class Expected:
    """
    The answer to each image alone.

    Args:
        port (`int`): of the server.
        stages (`dict`): of `stages_of_queries`.
        tolerance (`float`): between scores, and between entropies, of the same image in other batches.

    Raises:
        RuntimeError: if an answer is none, or exits at another stage than its τ asks for.
    """

    def __init__(self, port: int, stages: dict[str, int | None], tolerance: float):
        self.images, self.queries, self.tolerance = [jpeg(seed) for seed in range(IMAGES)], list(stages), tolerance
        self.answers: dict[tuple[int, str], Answer] = {}
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        for (image, body), (query, stage) in itertools.product(enumerate(self.images), stages.items()):
            status, content, _ = ask(connection, query, body)
            answer = json.loads(content) if status == 200 else {}
            wrong = difference(answer, answer, tolerance)
            if wrong is None and stage not in (None, answer["exit_stage"]):
                wrong = f"stage {answer['exit_stage']} instead of {stage}"
            if wrong is not None:
                raise RuntimeError(f"The answer to image {image} alone, /classify{query}, is wrong: {status}, {wrong}")
            self.answers[image, query] = answer
        connection.close()

    def wrong(self, image: int, query: str, status: int, content: bytes) -> str | None:
        """What is wrong with the answer to an image; `None` if nothing is."""
        if status != 200:
            return f"{status}: {content[:200]!r}"
        answer = json.loads(content)
        found = difference(answer, self.answers[image, query], self.tolerance)
        if found is not None and not query:  # near the model's τ, rounding decides at which stage an image exits
            others = [self.answers[image, other] for other in self.queries]
            found = found if all(difference(answer, other, self.tolerance) for other in others) else None
        return found and f"image {image}, /classify{query}: {found}"

    def share_told_apart(self) -> float:
        """Of the pairs of images, those whose answers differ by more than rounding: only they show a swap."""
        pairs = [
            difference(self.answers[one, query], self.answers[other, query], 2 * self.tolerance) is not None
            for one, other in itertools.combinations(range(IMAGES), 2)
            for query in self.queries
        ]
        return sum(pairs) / len(pairs)


class Client(threading.Thread):
    """Sends `count` requests; `seconds` are of right answers, `lost` says what is wrong with each other one."""

    def __init__(self, port: int, number: int, count: int, expected: Expected):
        super().__init__()
        self.port, self.number, self.count, self.expected = port, number, count, expected
        self.seconds: list[float] = []
        self.statuses: Counter = Counter()
        self.lost: list[str] = []

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        for n in range(self.count):
            started = time.perf_counter()
            try:
                wrong = self._send(connection, n)
            except Exception as error:  # also of `http.client` and of JSON: whatever it is, the request is lost
                wrong = repr(error)
                connection.close()
            if wrong is None:
                self.seconds.append(time.perf_counter() - started)
            else:
                self.lost.append(wrong)
        connection.close()

    def _send(self, connection: HTTPConnection, n: int) -> str | None:
        """What is wrong with the answer to request n; `None` if nothing is."""
        bad = (self.number + n) % 20 == 19
        image, query = (7 * self.number + n) % IMAGES, self.expected.queries[n % len(self.expected.queries)]
        body, deadline = b"no image" if bad else self.expected.images[image], time.monotonic() + PATIENCE
        while True:
            status, content, seconds = ask(connection, query, body)
            self.statuses[status] += 1
            if status != 503:
                break
            if time.monotonic() > deadline:
                return f"503 for {PATIENCE} seconds"
            time.sleep(seconds)
        if bad:
            return None if status == 400 else f"{status} for what is no image: {content[:200]!r}"
        return self.expected.wrong(image, query, status, content)


def load(port: int, expected: Expected, clients: int, requests: int) -> tuple[list[Client], list[str]]:
    """Send requests from that many clients at once. Returns them, and what is wrong with each request that is lost."""
    threads = [
        Client(port, number, requests // clients + (number < requests % clients), expected) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [reason for thread in threads for reason in thread.lost]
    missing = requests - len(lost) - sum(len(thread.seconds) for thread in threads)
    return threads, lost + ["never sent, or its client ended before the answer"] * missing


def at_the_end(port: int, server: subprocess.Popen, expected: Expected, count: int = 8) -> tuple[str, list[str]]:
    """
    Ask the server to end while it reads requests, half of which have been sent whole: it has accepted them, as it says
    by the status 100, and must answer each. Returns a line on it, and what is wrong with each request that is lost.
    """
    connections = [HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(count)]
    lost = []
    for image, connection in enumerate(connections):
        connection.putrequest("POST", "/classify")
        connection.putheader("Content-Length", str(len(expected.images[image])))
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        interim = b""
        while not interim.endswith(b"\r\n\r\n"):
            received = connection.sock.recv(1)
            if not received:
                raise RuntimeError(f"the server closed the connection after {interim!r}")
            interim += received
        if not interim.startswith(b"HTTP/1.1 100"):
            raise RuntimeError(f"the server answers before it has read the request: {interim!r}")
    for image, connection in enumerate(connections):
        if image == count // 2:
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.5)
        try:
            connection.send(expected.images[image])
        except OSError as error:
            lost.append(f"at the end: {error!r}")
            connection.close()
    for image, connection in enumerate(connections):
        if connection.sock is None:
            continue
        try:
            answer = connection.getresponse()
            wrong = expected.wrong(image, "", answer.status, answer.read())
        except Exception as error:  # as in `Client`
            wrong = repr(error)
        if wrong is not None:
            lost.append(f"at the end: {wrong}")
        connection.close()
    try:
        status = server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        status = None
    if status not in (0, -signal.SIGTERM):
        lost.append(f"at the end: the server's exit status is {status}")
    return f"shutdown: exit status {status}, {count} accepted requests under way, lost: {len(lost)}", lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--max-requests", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.01, help="of scores and entropies between batches")
    arguments = parser.parse_args()
    stages = stages_of_queries(AutoConfig.from_pretrained(arguments.model))
    port = free_port()
    words = ["--model", arguments.model, "--port", str(port), "--max-requests", str(arguments.max_requests)]
    words += ["--precision", arguments.precision] if arguments.precision else []
    server = subprocess.Popen(
        [sys.executable, str(SERVER), *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        ready(port, server)
        expected = Expected(port, stages, arguments.tolerance)
        started = time.perf_counter()
        clients, lost = load(port, expected, arguments.clients, arguments.requests)
        seconds = time.perf_counter() - started
        times = sorted(1e3 * value for client in clients for value in client.seconds)
        statuses = sum((client.statuses for client in clients), Counter())
        print(describe_run_of(arguments))
        answered = f"{len(times)} of {arguments.requests} requests"
        print(f"{answered} of {arguments.clients} clients: {len(times) / seconds:.0f}/s")
        if len(times) > 1:
            quantiles = statistics.quantiles(times, n=100)
            print(f"milliseconds: median {quantiles[49]:.1f}, 95 % {quantiles[94]:.1f}, 99 % {quantiles[98]:.1f}")
        print(f"statuses: {dict(statuses)}; lost: {len(lost)} {lost[:3]}")
        print(f"{expected.share_told_apart():.0%} of the pairs of images have answers that tell them apart")
        line, lost_at_the_end = at_the_end(port, server, expected, min(8, arguments.max_requests))
        print(line)
        if lost or lost_at_the_end:
            sys.exit("\n".join(["requests were lost:", *(lost + lost_at_the_end)[:20]]))
    finally:
        if server.poll() is None:
            server.kill()


def describe_run_of(arguments: argparse.Namespace) -> str:
    import torch

    return describe_run(torch.device("cpu"), arguments.precision or "the precision of the model")


if __name__ == "__main__":
    main()
