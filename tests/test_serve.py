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
from hf_thinkingvit.inference import AdaptiveEngine
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
def served(max_requests: int = 256, model=None, **options):
    """The service of a model on a free port of this machine: its port, its engine, and the server."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason=f"the service needs {package}")
    import uvicorn

    build_app = runpy.run_path(str(EXAMPLES / "serve.py"))["build_app"]
    model = with_exits(NETWORKS["vit"]()) if model is None else model
    options = {"batch_size": 8, "max_wait": 0.005, **options}
    engine = AdaptiveEngine(model, evaluation_image_processor(32), in_order=False, on_error="return", **options)
    app = build_app(engine, max_requests, max_bytes=100_000)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield listening.getsockname()[1], app, server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


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

    def test_back_pressure_and_shutdown(self):
        """A second request is refused while one waits; that one is answered although the server shuts down."""
        with served(max_requests=1, max_wait=30.0) as (port, app, server):
            first = []
            waiting = threading.Thread(target=lambda: first.append(ask(port, "/classify", png(0))))
            waiting.start()
            deadline = time.monotonic() + 20
            while app.state.service.waiting == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            status, answer, headers = ask(port, "/classify", png(1))
            assert (status, headers["retry-after"]) == (503, "1") and "wait already" in answer["detail"]
            server.should_exit = True
            app.state.service.close()  # as the end of the server does, once open requests have their answers
            waiting.join(timeout=60)
        assert first[0][0] == 200
