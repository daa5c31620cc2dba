"""
Publish a trained model: weights, image processor, code and a model card with the measured results.

    python examples/push_to_hub.py --model MODEL --repo-id org/name --results results.json --dry-run FOLDER
    python examples/push_to_hub.py --model MODEL --repo-id org/name --results results.json --license mit

The first command writes everything to a folder for inspection. The second needs `hf auth login` and makes one commit.
`hf_thinkingvit.hub.results` describes the results file.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging

import hf_thinkingvit  # noqa: F401  registers the models
from hf_thinkingvit.hub import push


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the model and its image processor")
    parser.add_argument("--repo-id", required=True, help="organization/name of the repository; created if needed")
    parser.add_argument(
        "--results", type=Path, help="JSON file of what was measured; without it the card has no figures"
    )
    parser.add_argument("--license", help="of the weights, such as apache-2.0")
    parser.add_argument("--datasets", nargs="+", help="Hub ids of what the model was trained on")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--commit-message", default="Upload model")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write everything to this folder instead")
    arguments = parser.parse_args()
    logging.disable_progress_bar()

    try:
        done = push(
            AutoModelForImageClassification.from_pretrained(arguments.model),
            AutoImageProcessor.from_pretrained(arguments.model),
            arguments.repo_id,
            results=arguments.results,
            license=arguments.license,
            datasets=arguments.datasets,
            private=arguments.private,
            commit_message=arguments.commit_message,
            dry_run=arguments.dry_run,
        )
    except (OSError, ValueError) as error:  # a missing token raises a PermissionError, which is an OSError
        sys.exit(f"error: {error}")
    print(f"written to {done}" if isinstance(done, Path) else f"pushed: {done.commit_url}")


if __name__ == "__main__":
    main()
