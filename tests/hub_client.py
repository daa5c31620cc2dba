"""
Reads jobs from stdin, one JSON object per line, pushes a model for each, and writes the result as a line to stdout.

It runs as a separate process, because `huggingface_hub` reads the Hub's address and the offline mode when it is
imported, and the tests run offline.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def outcome(function: Callable, *arguments: Any, **options: Any) -> dict[str, str]:
    """The commit that a push made, or its error."""
    try:
        return {"commit": function(*arguments, **options).oid}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the results
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_thinkingvit.hub import push, push_space

    for line in sys.stdin:
        job = json.loads(line)
        folder, token = job.pop("folder"), job.pop("logged_in_with")
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        if folder is None:  # a Space
            print(json.dumps(outcome(push_space, **job)), file=answers, flush=True)
            continue
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        print(json.dumps(outcome(push, model, processor, **job)), file=answers, flush=True)


if __name__ == "__main__":
    main()
