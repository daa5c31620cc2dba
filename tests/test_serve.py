"""examples/serve.py over loopback."""

import io
import json
import runpy
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine, ServiceClosed
from tests.inference.conftest import NETWORKS, with_exits
from tests.utils import lively_model


EXAMPLES = Path(__file__).parents[1] / "examples"


def png(seed: int, black: tuple[int, int] | None = None, file_format: str = "png") -> bytes:
    """Noise, or a black image of a size, in few bytes."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise) if black is None else Image.new("1", black)
    content = io.BytesIO()
    image.save(content, file_format)
    return content.getvalue()


@contextmanager
def served(max_requests: int = 256, model=None, body_timeout: float = 30, shutdown_timeout: int = 20, **options):
    """The service of a model on a free port of this machine: its port, its application, and the server."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"the service needs {package}")
    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    model = with_exits(NETWORKS["vit"]()) if model is None else model
    options = {"batch_size": 8, "max_wait": 0.005, **options}
    engine = AdaptiveEngine(model, evaluation_image_processor(32), in_order=False, on_error="return", **options)
    app = example["build_app"](engine, max_requests, max_bytes=100_000, body_timeout=body_timeout)
    listening = socket.create_server(("127.0.0.1", 0))
    server = example["make_server"](app, shutdown_timeout=shutdown_timeout)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started)
        yield listening.getsockname()[1], app, server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def unfinished_upload(port: int, body: bytes):
    """A connection whose request is being read, without its body so far: the server has asked for it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        yield connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, dict | str, dict]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        content = answer.read().decode()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content, dict(answer.headers)
    finally:
        connection.close()


class TestService:
    def test_answers_and_refusals(self):
        with served() as (port, app, _):
            model = app.state.service.engine.model
            pixel_values = evaluation_image_processor(32)(Image.open(io.BytesIO(png(0))), return_tensors="pt")
            for query, arguments in (
                ("", {}),
                ("&threshold=0", {"threshold": 0.0}),
                ("&threshold=99", {"threshold": 99}),
            ):
                with torch.no_grad():
                    expected = model(**pixel_values, **arguments)
                status, answer, _ = ask(port, f"/classify?top_k=2{query}", png(0))
                assert status == 200
                assert answer["exit_stage"] == expected.exit_stage.item()
                assert answer["entropy"] == pytest.approx(expected.entropy.item(), abs=1e-4)
                scores, classes = expected.logits[0].softmax(dim=-1).topk(2)
                assert [entry["label"] for entry in answer["labels"]] == [
                    f"LABEL_{place}" for place in classes.tolist()
                ]
                assert [entry["score"] for entry in answer["labels"]] == pytest.approx(scores.tolist(), abs=1e-4)
            for path, body, status, reason in (
                ("/classify", b"no image", 400, "no image that can be read: its 8 bytes are in none of"),
                ("/classify", png(0, file_format="eps"), 400, "formats JPEG, PNG, "),  # would run Ghostscript
                ("/classify", png(0)[:200], 400, "truncated"),
                ("/classify", b"", 400, "empty"),
                ("/classify", png(0, (7000, 6000)), 400, "7000×6000 pixels are more than 40000000"),
                ("/classify", bytes(100_001), 413, "more than 100000 bytes"),
                ("/classify?threshold=-1", png(0), 422, "threshold"),
                ("/classify?threshold=nan", png(0), 422, "threshold"),
                ("/classify?threshold=low", png(0), 422, "valid number"),
                ("/classify?top_k=0", png(0), 422, "top_k"),
                ("/classify?treshold=0", png(0), 422, "['treshold'], only `threshold` and `top_k`"),
                ("/classify?top_k=1&top_k=2", png(0), 422, "`top_k` must be given once"),
                ("/classify?threshold=0&threshold=0&threshold=0", png(0), 422, "threshold"),
            ):
                found, answer, _ = ask(port, path, body)
                assert found == status
                assert reason in str(answer["detail"])
                assert "object at" not in str(answer["detail"])
            assert ask(port, "/health")[:2] == (200, {"status": "ok"})
            metrics = ask(port, "/metrics")[1]
            assert 'requests_total{status="200"} 3.0' in metrics
            assert 'requests_total{status="413"} 1.0' in metrics
            assert "requests_waiting 0.0" in metrics and "exits_total" in metrics

    def test_scores_of_a_multi_label_model_are_of_each_label(self):
        model = lively_model(problem_type="multi_label_classification", num_hidden_layers=1)
        pixel_values = evaluation_image_processor(32)(Image.open(io.BytesIO(png(0))), return_tensors="pt")
        with served(model=model) as (port, *_):
            status, answer, _ = ask(port, "/classify?top_k=100", png(0))
        with torch.no_grad():
            scores = model(**pixel_values).logits[0].sigmoid().sort(descending=True).values
        assert status == 200
        assert [entry["score"] for entry in answer["labels"]] == pytest.approx(scores.tolist(), abs=1e-4)

    def test_an_answer_that_is_not_finite_has_no_labels(self):
        model = lively_model(num_hidden_layers=1)
        torch.nn.init.constant_(next(model.parameters()), torch.nan)
        with served(model=model) as (port, *_):
            status, answer, _ = ask(port, "/classify", png(0))
            assert status == 500 and "not finite" in answer["detail"]
            assert ask(port, "/health")[0] == 200

    def test_a_regression_is_refused(self):
        regression = served(model=lively_model(problem_type="regression", num_hidden_layers=1))
        with pytest.raises(ValueError, match="predicts values, and has no classes"), regression:
            pass

    def test_under_load_no_request_is_lost(self):
        """Each client gets the answer to its own image, and later stages run on batches of several requests."""
        bodies = [png(seed) for seed in range(12)]
        with served(max_wait=0.05) as (port, app, _):
            expected = [ask(port, "/classify", body)[1] for body in bodies]
            answers = []

            def client(start: int) -> None:
                for n in range(10):
                    place = (start + n) % len(bodies)
                    answers.append((place, *ask(port, "/classify", bodies[place])[:2]))

            clients = [threading.Thread(target=client, args=(start,)) for start in range(8)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            stats = app.state.service.engine.stats
        assert len(answers) == 80
        for place, status, answer in answers:
            assert status == 200
            assert answer["exit_stage"] == expected[place]["exit_stage"]
            assert answer["labels"][0]["score"] == pytest.approx(expected[place]["labels"][0]["score"], abs=1e-4)
        assert stats.rows[0] == 92 and stats.batches[0] < 92

    def test_each_exit_may_have_a_threshold_of_its_own(self):
        model = lively_model(thinking_stages=[1, 2, 4], exit_criterion="entropy", threshold=0.5)
        with served(model=model) as (port, *_):
            for thresholds, stage in (((0, 0), 2), ((0, 99), 1), ((99, 0), 0)):
                query = "&".join(f"threshold={value}" for value in thresholds)
                assert ask(port, f"/classify?{query}", png(0))[1]["exit_stage"] == stage

    def test_the_end_answers_accepted_requests_and_closes_the_service(self):
        answers = []
        with served(max_wait=1.0) as (port, app, server):
            service = app.state.service
            clients = [
                threading.Thread(target=lambda: answers.append(ask(port, "/classify?threshold=99", png(0))[0]))
                for _ in range(2)
            ]
            for client in clients:
                client.start()
            until(lambda: service.waiting == 2)
            assert not answers
            server.should_exit = True  # as SIGTERM sets it
            for client in clients:
                client.join(timeout=30)
        assert answers == [200, 200]
        with pytest.raises(ServiceClosed):
            service.submit(Image.new("RGB", (8, 8)))

    def test_a_place_is_taken_before_the_body_is_read(self):
        """And given back after the answer, and by a client that leaves."""
        with served(max_requests=1) as (port, *_):
            with unfinished_upload(port, png(0)) as upload:
                status, answer, headers = ask(port, "/classify", png(1))
                assert (status, headers["retry-after"]) == (503, "1") and "wait already" in answer["detail"]
                upload.sendall(png(0))
                assert upload.recv(100).startswith(b"HTTP/1.1 200")
            with unfinished_upload(port, png(0)):
                assert ask(port, "/classify", png(1))[0] == 503
            until(lambda: ask(port, "/classify", png(1))[0] == 200)

    def test_a_body_that_does_not_arrive_is_given_up(self):
        with served(max_requests=1, body_timeout=0.3) as (port, *_):
            with unfinished_upload(port, png(0)) as upload:
                upload.sendall(png(0)[:10])
                answer = received(upload)
                assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.3 seconds" in answer
            assert ask(port, "/classify", png(0))[0] == 200

    def test_an_unfinished_upload_does_not_keep_the_server(self):
        with served(shutdown_timeout=1) as (port, app, server), unfinished_upload(port, png(0)) as upload:
            server.should_exit = True
            received(upload)  # returns, since the server closes the connection long before `body_timeout`
        with pytest.raises(ServiceClosed):
            app.state.service.submit(Image.new("RGB", (8, 8)))
