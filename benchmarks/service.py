"""
A load test of `examples/serve.py` over loopback:

    python -m benchmarks.service --model outputs/openvino --clients 16 --requests 2000

The server runs in a process of its own. Every client sends one image after another over one connection, good and bad
ones, with and without τ; a 503 is asked again after `Retry-After`. A request is lost if it has no answer, or the answer
has another status than its image and τ should have. At the end the server gets SIGTERM while requests are under way:
those that it has accepted must be answered.
"""

import argparse
import io
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

import numpy as np
from PIL import Image

from benchmarks.measure import describe_run


SERVER = Path(__file__).parents[1] / "examples" / "serve.py"


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


class Client(threading.Thread):
    """Sends `count` requests; counts what came back."""

    def __init__(self, port: int, number: int, count: int):
        super().__init__()
        self.port, self.number, self.count = port, number, count
        self.seconds: list[float] = []
        self.statuses: Counter = Counter()
        self.lost: list[str] = []

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        for n in range(self.count):
            bad = n % 50 == 49
            body = b"no image" if bad else jpeg(self.number * 1000 + n % 20)
            path = ["/classify", "/classify?threshold=0", "/classify?threshold=99"][n % 3]
            started = time.perf_counter()
            try:
                while True:
                    connection.request("POST", path, body)
                    answer = connection.getresponse()
                    content = answer.read()
                    self.statuses[answer.status] += 1
                    if answer.status != 503:
                        break
                    time.sleep(float(answer.headers["Retry-After"]))
            except OSError as error:
                self.lost.append(repr(error))
                connection.close()
                continue
            self.seconds.append(time.perf_counter() - started)
            if answer.status != (400 if bad else 200):
                self.lost.append(f"{answer.status}: {content[:200]!r}")


def at_the_end(port: int, server: subprocess.Popen) -> str:
    """Requests under way while the server is asked to end: each must be answered or refused, none may hang."""
    clients = [Client(port, 500 + number, 1) for number in range(8)]
    for client in clients:
        client.start()
    time.sleep(0.01)
    os.kill(server.pid, signal.SIGTERM)
    for client in clients:
        client.join(timeout=60)
    server.wait(timeout=60)
    answered = sum(len(client.seconds) for client in clients)
    return (
        f"shutdown: exit status {server.returncode}, {answered} of 8 requests under way answered, others not accepted"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--max-requests", type=int, default=256)
    arguments = parser.parse_args()
    port = free_port()
    words = ["--model", arguments.model, "--port", str(port), "--max-requests", str(arguments.max_requests)]
    words += ["--precision", arguments.precision] if arguments.precision else []
    server = subprocess.Popen(
        [sys.executable, str(SERVER), *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        ready(port, server)
        share = arguments.requests // arguments.clients
        clients = [Client(port, number, share) for number in range(arguments.clients)]
        started = time.perf_counter()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - started
        times = sorted(1e3 * value for client in clients for value in client.seconds)
        lost = [reason for client in clients for reason in client.lost]
        statuses = sum((client.statuses for client in clients), Counter())
        print(describe_run_of(arguments))
        print(f"{len(times)} requests of {arguments.clients} clients: {len(times) / seconds:.0f}/s")
        quantiles = statistics.quantiles(times, n=100)
        print(f"milliseconds: median {quantiles[49]:.1f}, 95 % {quantiles[94]:.1f}, 99 % {quantiles[98]:.1f}")
        print(f"statuses: {dict(statuses)}; lost: {len(lost)} {lost[:3]}")
        print(at_the_end(port, server))
    finally:
        if server.poll() is None:
            server.kill()


def describe_run_of(arguments: argparse.Namespace) -> str:
    import torch

    return describe_run(torch.device("cpu"), arguments.precision or "the precision of the model")


if __name__ == "__main__":
    main()
