"""
Reads jobs from stdin, one JSON object per line, pushes a model for each, and writes the result as a line to stdout.

It runs as a separate process, because `huggingface_hub` reads the Hub's address and the offline mode when it is
imported, and the tests run offline.
"""

import json
import os
import sys


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the results
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_thinkingvit.hub import push

    for line in sys.stdin:
        job = json.loads(line)
        folder, token = job.pop("folder"), job.pop("logged_in_with")
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        try:
            answer = {"commit": push(model, processor, **job).oid}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
