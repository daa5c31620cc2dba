"""Publishes a model with its card. `options.py` has its options and description."""

import argparse
from pathlib import Path

from ..hub import push
from . import command
from .loading import load_model, start


def run(arguments: argparse.Namespace) -> None:
    model, processor = load_model(arguments.model, task=None)
    place = arguments.dry_run or f"https://huggingface.co/{arguments.repo_id}"
    start(model, results=arguments.results or "none: the card has no figures", saved_to=place)
    done = push(
        model,
        processor,
        arguments.repo_id,
        results=arguments.results,
        license=arguments.license,
        datasets=arguments.datasets,
        private=arguments.private,
        commit_message=arguments.commit_message,
        dry_run=arguments.dry_run,
    )
    print(f"written to {done}" if isinstance(done, Path) else f"pushed: {done.commit_url}")


def main(words: list[str] | None = None, prog: str | None = None) -> None:
    command.run_command("push", words, prog)


if __name__ == "__main__":
    main()
