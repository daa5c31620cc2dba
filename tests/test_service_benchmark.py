"""benchmarks/service.py against servers that lose, cut off or swap answers: each of these must be noticed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import service
from tests.utils import lively_model


STAGES = {"": None, "?threshold=0": 1, "?threshold=99": 0}
BODIES = [service.jpeg(seed) for seed in range(service.IMAGES)]


def right_answer(image: int, path: str) -> dict:
    stage = {"99": 0, "0": 1}.get(path.partition("threshold=")[2], image % 2)
    labels = [{"label": f"LABEL_{image}", "score": 0.5 + image / 50}, {"label": "other", "score": 0.1}]
    return {"labels": labels, "exit_stage": stage, "entropy": 1 + image / 10 - stage / 2}


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def do_POST(self):  # the name that http.server asks for
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault, status, cut = self.server.fault, 200, False
        if body not in BODIES:
            status, answer = 200 if fault == "accepts anything" else 400, {}
        else:
            image = BODIES.index(body)
            answer = right_answer(image, self.path)
            if fault == "swapped":
                answer = right_answer((image + 2) % service.IMAGES, self.path)
            elif fault == "wrong stage" and "threshold=0" in self.path:
                answer = right_answer(image, "/classify?threshold=99")
            elif fault == "empty":
                answer = {}
            elif fault == "full" and not self.server.refusals:
                self.server.refusals, status = 1, 503
            cut = fault == "cut off"
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    """Without faults until a test sets one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.daemon_threads = None, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def answers(server):
    """What the server answers to each image alone."""
    return service.Expected(server.server_port, STAGES, tolerance=0.01)


@pytest.fixture
def expected(answers, server, monkeypatch):
    monkeypatch.setattr(server, "fault", None)
    monkeypatch.setattr(server, "refusals", 0, raising=False)
    return answers


@pytest.mark.parametrize(
    "fault, lost, reason",
    [
        (None, 0, None),
        ("full", 0, None),
        ("cut off", 57, "IncompleteRead"),
        ("empty", 57, "no answer of the service"),
        ("swapped", 57, "instead of"),
        ("wrong stage", 20, "stage 0 instead of 1"),
        ("accepts anything", 3, "200 for what is no image"),
    ],
)
def test_every_fault_counts_as_lost(fault, lost, reason, server, expected):
    """60 requests of three clients, each of which sends one that is no image."""
    assert expected.share_told_apart() == 1
    server.fault = fault
    clients, found = service.load(server.server_port, expected, clients=3, requests=60)
    assert len(found) == lost and all(reason in one for one in found)
    assert sum(len(client.seconds) for client in clients) == 60 - lost
    assert sum(client.statuses[503] for client in clients) == (fault == "full")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_of_a_client_that_ends_are_lost(server, expected, monkeypatch):
    def end(self, connection, n):
        raise SystemExit

    monkeypatch.setattr(service.Client, "_send", end)
    _, lost = service.load(server.server_port, expected, clients=2, requests=5)
    assert len(lost) == 5 and "never sent" in lost[0]


def test_the_stage_of_an_image_alone_is_that_of_its_threshold(server, expected):
    server.fault = "wrong stage"
    with pytest.raises(RuntimeError, match="stage 0 instead of 1"):
        service.Expected(server.server_port, STAGES, tolerance=0.01)


def test_an_answer_near_the_threshold_may_exit_at_either_stage_but_not_be_another_images(expected):
    other_stage = json.dumps(right_answer(0, "/classify?threshold=0")).encode()
    assert expected.wrong(0, "", 200, other_stage) is None
    assert "stage 1" in expected.wrong(0, "?threshold=99", 200, other_stage)
    assert expected.wrong(2, "", 200, other_stage) is not None


@pytest.mark.parametrize("criterion, at_zero, at_great", [("entropy", 1, 0), ("max_probability", 0, 1)])
def test_stages_of_queries_follow_the_direction_of_the_criterion(criterion, at_zero, at_great):
    config = lively_model(thinking_stages=[1, 4], exit_criterion=criterion, threshold=0.5).config
    assert service.stages_of_queries(config) == {"": None, "?threshold=0": at_zero, "?threshold=99": at_great}
