"""
Trains every method on one data set with one budget of epochs, evaluates each at every operating point, and writes a
table (Markdown, CSV, JSON) and a picture: accuracy against mean multiply-accumulates, and against images per second.

    python -m benchmarks.compare --output-dir outputs/compare --epochs 8 --in_memory true --jobs 2 --seeds 0 1 2
    python -m benchmarks.compare --config examples/configs/thinkingvit_3_6_imagenet.yaml --output-dir outputs/imagenet

Small by default: CIFAR-10, in the sizes of `thinkingvit_cifar10.yaml`, whose first and last stage are the two plain
nets. All flags that are not listed here are those of a training run (`examples/train.py --help`), and common to all
methods; what is a method's own (sampling of sub-networks, micro-batches, clipping, distillation, frozen weights) is
as in its shipped configuration: that for ImageNet where the name of `--config` ends so, and else that for CIFAR-10.
Methods that are published as fine-tuning start from the wide plain net of their seed and train `--fine-tuning-epochs`
more; the table declares the images that each has seen, with those of its start. `--trained plain_wide=FOLDER` evaluates
and starts from a model that is there.

Finished methods are not repeated, and an interrupted one resumes from its last checkpoint. Each run records its
settings: in the same folder, a comparison with others is refused (with `--redo` it trains those runs anew), and one
with other images to evaluate on evaluates anew. The last epoch is reported, and nothing is chosen by the images that
are reported.
"""

import argparse
import dataclasses
import math
import multiprocessing
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch

from benchmarks.compare_methods import CONFIGS, DATA, METHODS, with_starts
from benchmarks.compare_report import measure_speed, write_report
from benchmarks.compare_runs import Job, perform
from benchmarks.compare_settings import check_given, prepare, record
from hf_thinkingvit.data import load_splits
from hf_thinkingvit.training import TrainingConfig, parse_config
from hf_thinkingvit.training.data import load_data
from hf_thinkingvit.training.memory_images import load_in_memory


CONFIG = CONFIGS / "thinkingvit_cifar10.yaml"


def base_config(config: Path, flags: list[str]) -> tuple[TrainingConfig, dict[str, int]]:
    """
    The configuration that all methods share, and the images of each split, where they are known. Its evaluation split
    is the one that is reported.
    """
    base = parse_config(["--config", str(config), *flags])
    splits = load_splits(base.dataset, base.streaming)
    if base.eval_split is None:
        base.eval_split = next(name for name in ("validation", "val", "test") if name in splits)
    if base.in_memory:
        data = load_data(dataclasses.replace(base, max_eval_samples=None))
        load_in_memory(data.train)  # once, into the cache that all runs read
        load_in_memory(data.evaluation.sample(base.max_eval_samples))
    return base, {} if base.streaming else {name: len(rows) for name, rows in splits.items()}


def train_all(jobs: list[Job], at_once: int, seconds: float | None = None) -> list[Job]:
    """
    Perform the jobs, each in a process of its own as soon as the job that it starts from is done. After `seconds` no
    further one is begun, and those that run are stopped, which saves a checkpoint. Returns the jobs that failed, and
    those that had to start from them.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.compare_runs"])  # imports take seconds: once for all processes
    waiting, running = [job for job in jobs if not job.result.exists()], {}
    failed: list[Job] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if job.start is not None and any(job.start.name == other.name for other in failed):
                    waiting.remove(job)
                    failed.append(job)
                elif len(running) < at_once and (job.start is None or is_done(job.start, jobs)):
                    waiting.remove(job)
                    job.folder.mkdir(parents=True, exist_ok=True)
                    record(job)
                    process = context.Process(target=perform, args=(job,))
                    process.start()
                    running[process.sentinel] = process, job
            left = deadline - time.monotonic()
            if left <= 0:
                failed += waiting
                waiting.clear()
                for process, _ in running.values():
                    process.terminate()
            for sentinel in wait(list(running), left if 0 < left < math.inf else None) if running else ():
                process, job = running.pop(sentinel)
                process.join()
                done = process.exitcode == 0
                print(f"{job.name}: {'done' if done else f'not done, see {job.folder}/log.txt'}", flush=True)
                if not done:
                    failed.append(job)
    except KeyboardInterrupt:  # which the processes get as well, and save a checkpoint
        for process, _ in running.values():
            process.join()
        raise
    return failed


def is_done(start: Job, jobs: list[Job]) -> bool:
    return start.trained is not None or next(job for job in jobs if job.name == start.name).result.exists()


def comparison(words: list[str] | None = None) -> tuple[argparse.Namespace, list[Job]]:
    """
    The flags of a command line that are not of a training run, and its jobs: first those that others wait for, and then
    one seed after the other. A given model is evaluated once, whatever the seeds.

    Raises:
        SystemExit: with code 2, for flags that do not exist, and given models that do not suit.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="of a run that trains a ThinkingViT")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fine-tuning-epochs", type=int, help="half of the epochs by default")
    parser.add_argument(
        "--trained", nargs="*", default=[], metavar="METHOD=FOLDER", help="models to evaluate, and start from, as given"
    )
    parser.add_argument("--redo", action="store_true", help="delete runs with other settings, and train them anew")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, on the same device")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of training; report what is done by then")
    parser.add_argument("--threads", type=int, help="of the CPU for each run; shared evenly by default")
    parser.add_argument("--speed-images", type=int, default=1024, help="whose classification is timed; 0 for none")
    parser.add_argument("--speed-batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="of each timing")
    arguments, flags = parser.parse_known_args(words)
    given = {name: Path(folder) for name, _, folder in (word.partition("=") for word in arguments.trained)}
    if unknown := given.keys() - METHODS.keys():
        parser.error(f"--trained: there is no method {sorted(unknown)}, but {list(METHODS)}")
    names = with_starts(arguments.methods, given)
    starts = [METHODS[name].start for name in names if name not in given]
    if unused := given.keys() - set(names):
        parser.error(f"--trained: {sorted(unused)} are neither among --methods nor the start of one")
    base, rows = base_config(arguments.config, flags)
    threads = arguments.threads or max(1, torch.get_num_threads() // arguments.jobs)
    jobs = [
        Job(
            name,
            seed,
            base,
            arguments.output_dir,
            arguments.fine_tuning_epochs or -(-base.epochs // 2),
            given,
            threads,
            next((name for name in DATA if arguments.config.stem.endswith(name)), DATA[0]),
            rows,
        )
        for name in names
        for seed in (arguments.seeds[:1] if name in given else arguments.seeds)
    ]
    try:
        for job in jobs:
            if job.trained is not None:
                check_given(job, job.method in starts)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments, sorted(jobs, key=lambda job: (job.method not in starts, job.seed))


def main(words: list[str] | None = None) -> None:
    arguments, jobs = comparison(words)
    try:
        prepare(jobs, arguments.redo)
    except ValueError as error:
        sys.exit(f"benchmarks.compare: {error}")
    failed = train_all(jobs, arguments.jobs, arguments.time_limit)
    done = [job for job in jobs if job.result.exists()]
    speeds = {}
    if arguments.speed_images:
        device = torch.device("cuda" if torch.cuda.is_available() and not jobs[0].base.cpu else "cpu")
        speeds = measure_speed(done, arguments.speed_images, arguments.speed_batch_size, arguments.repeats, device)
    print(write_report(done, speeds, arguments.output_dir))
    if failed:
        sys.exit(f"not done: {', '.join(job.name for job in failed)}")


if __name__ == "__main__":
    main()
