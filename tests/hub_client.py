"""
Pushes models as it is told, one JSON object a line, and answers each line with what came of it.

A process of its own: `huggingface_hub` reads the address of the Hub and whether it is offline when it is imported, and
the tests themselves run offline.
"""

import json
import os
import sys


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
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
