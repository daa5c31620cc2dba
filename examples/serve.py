"""
Classify images over HTTP, in batches of what arrives together:

    pip install "hf-thinkingvit[serve]"
    python examples/serve.py --model outputs/openvino --precision bf16 --port 8000
    curl --data-binary @examples/images/cat.jpg "http://127.0.0.1:8000/classify?threshold=0.9&top_k=3"

`--model` is a folder that `export_model` wrote, or a model with PyTorch weights. The body of a request is the file of
an image; `threshold` is τ of this request, repeated for one τ of each exit. Answers: 200 with labels, scores, exit
stage and entropy; 4xx with a reason for what is wrong with the request; 500 where the model's answer is not finite; 503
with Retry-After while as many requests as may are read or wait. `GET /health`, and `GET /metrics` for Prometheus.
SIGINT and SIGTERM end it after the requests that it has accepted, or after `--shutdown-timeout`.
"""

import argparse
import asyncio
import math
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated

import prometheus_client
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from PIL import Image
from starlette.requests import ClientDisconnect

from hf_thinkingvit.commands.loading import load_classifier
from hf_thinkingvit.inference import AdaptiveEngine, EngineService, ServiceClosed, ServiceFull
from hf_thinkingvit.inference.class_scores import best_classes, check_has_classes
from hf_thinkingvit.models.image_files import open_photo


def decode(content: bytes, max_pixels: int) -> Image.Image:
    image = open_photo(content)
    if image.width * image.height > max_pixels:  # a small file may be a large image: nothing is decoded so far
        raise ValueError(f"{image.width}×{image.height} pixels are more than {max_pixels}")
    image.load()  # a file that is cut off fails here, with its own reason
    return image


class Metrics:
    """What `/metrics` shows."""

    def __init__(self, service: EngineService):
        self.registry = prometheus_client.CollectorRegistry()
        make = partial(prometheus_client.Counter, registry=self.registry)
        self.requests = make("requests", "Requests by the status of their answer", ["status"])
        self.exits = make("exits", "Images by the stage at which they exited", ["stage"])
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "From the last byte of a request to its answer", registry=self.registry
        )
        waiting = prometheus_client.Gauge("requests_waiting", "Requests without an answer", registry=self.registry)
        waiting.set_function(lambda: service.waiting)
        rows = prometheus_client.Gauge(
            "mean_batch_size", "Images in a batch of a stage, on average", ["stage"], registry=self.registry
        )
        for stage in range(len(service.engine.stages)):
            rows.labels(stage).set_function(partial(mean_batch_size, service.engine, stage))


def mean_batch_size(engine: AdaptiveEngine, stage: int) -> float:
    return engine.stats.rows[stage] / max(engine.stats.batches[stage], 1)


def check_query(request: Request) -> None:
    """Refuse what would be ignored without a word."""
    unknown = sorted(set(request.query_params) - {"threshold", "top_k"})
    if unknown:
        raise HTTPException(422, f"There are no parameters {unknown}, only `threshold` and `top_k`.")
    if len(request.query_params.getlist("top_k")) > 1:
        raise HTTPException(422, "`top_k` must be given once.")


async def read_body(request: Request, max_bytes: int) -> bytes:
    content = bytearray()
    async for part in request.stream():  # bounded, whatever length the client announced
        content += part
        if len(content) > max_bytes:
            raise HTTPException(413, f"The image has more than {max_bytes} bytes.")
    if not content:
        raise HTTPException(400, "The body is empty: send the file of an image.")
    return bytes(content)


def busy(reason: object) -> HTTPException:
    return HTTPException(503, str(reason), headers={"Retry-After": "1"})


def build_app(
    engine: AdaptiveEngine,
    max_requests: int = 256,
    max_bytes: int = 20_000_000,
    max_pixels: int = 40_000_000,
    body_timeout: float = 30,
) -> FastAPI:
    """
    The application. Its engine must be made as [`EngineService`] asks, of a model with classes. At most `max_requests`
    bodies of `max_bytes` are in memory at a time, and each must arrive within `body_timeout` seconds.
    """
    check_has_classes(engine.model.config)
    service = EngineService(engine, max_requests)
    metrics = Metrics(service)
    places = asyncio.Semaphore(max_requests)  # a request holds one from before its body is read until its answer

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="hf-thinkingvit", lifespan=lifespan)
    app.state.service = service

    @app.middleware("http")
    async def count(request: Request, call_next):
        response = await call_next(request)
        if request.url.path == "/classify":
            metrics.requests.labels(response.status_code).inc()
        return response

    @app.post("/classify")
    async def classify(
        request: Request, threshold: Annotated[list[float] | None, Query()] = None, top_k: int = 5
    ) -> dict:
        check_query(request)
        if top_k < 1:
            raise HTTPException(422, f"`top_k` must be at least 1, got {top_k}.")
        if places.locked():
            raise busy(f"{max_requests} requests wait already.")
        async with places:
            return await answer(request, threshold[0] if threshold and len(threshold) == 1 else threshold, top_k)

    async def answer(request: Request, threshold: float | list[float] | None, top_k: int) -> dict:
        try:
            content = await asyncio.wait_for(read_body(request, max_bytes), body_timeout)
        except asyncio.TimeoutError as error:
            reason = f"The body did not arrive within {body_timeout} seconds."
            raise HTTPException(408, reason, headers={"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The client left before the end of the body.") from error
        started = time.perf_counter()
        try:
            future = service.submit(partial(decode, content, max_pixels), threshold)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except (ServiceFull, ServiceClosed) as error:
            raise busy(error) from error
        try:
            result = await asyncio.wrap_future(future)
        except ServiceClosed as error:
            raise busy(error) from error
        if result.error is not None:
            raise HTTPException(400, f"The body is no image that can be read: {result.error.__cause__ or result.error}")
        metrics.seconds.observe(time.perf_counter() - started)
        try:
            best = best_classes(result.logits, engine.model.config, top_k)
        except ArithmeticError as error:
            raise HTTPException(500, str(error)) from error
        metrics.exits.labels(result.exit_stage).inc()
        entropy = result.entropy if math.isfinite(result.entropy) else None  # JSON has no NaN
        labels = [{"label": label, "score": score} for label, score in best]
        return {"labels": labels, "exit_stage": result.exit_stage, "entropy": entropy}

    @app.get("/health")
    def health() -> dict:
        if service.failure is not None:
            raise HTTPException(500, f"The engine failed: {service.failure!r}")
        return {"status": "ok"}

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(prometheus_client.generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    return app


def make_server(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, shutdown_timeout: int = 20) -> uvicorn.Server:
    """Its end waits `shutdown_timeout` seconds for open requests, such as uploads that have stalled."""
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=shutdown_timeout))


def load_engine(model: str, precision: str | None = None, threads: int | None = None, **options) -> AdaptiveEngine:
    """The engine of a service, for an exported folder or a model with PyTorch weights."""
    network, processor = load_classifier(model, precision, threads)
    return AdaptiveEngine(network, processor, in_order=False, on_error="return", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of an exported folder")
    parser.add_argument("--threads", type=int, help="of the runtime of an exported folder")
    parser.add_argument("--threshold", type=float, help="τ of requests without their own; by default the model's")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-wait", type=float, default=0.005, help="seconds that a request waits for others")
    parser.add_argument("--max-requests", type=int, default=256, help="read or waiting; beyond them the answer is 503")
    parser.add_argument("--max-pixels", type=int, default=40_000_000, help="of an image, which is decoded as a whole")
    parser.add_argument("--body-timeout", type=float, default=30, help="seconds in which a body must arrive")
    parser.add_argument("--shutdown-timeout", type=int, default=20, help="seconds that open requests have at the end")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    engine = load_engine(
        arguments.model,
        arguments.precision,
        arguments.threads,
        batch_size=arguments.batch_size,
        max_wait=arguments.max_wait,
        threshold=arguments.threshold,
    )
    app = build_app(
        engine, arguments.max_requests, max_pixels=arguments.max_pixels, body_timeout=arguments.body_timeout
    )
    with suppress(KeyboardInterrupt):  # which the server raises again once it has ended
        make_server(app, arguments.host, arguments.port, arguments.shutdown_timeout).run()


if __name__ == "__main__":
    main()
