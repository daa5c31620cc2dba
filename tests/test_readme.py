"""Runs every Python snippet of the READMEs and guides unchanged. New snippets are found automatically."""

import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, DeiTConfig, DeiTForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_thinkingvit import EXIT_CRITERIA
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.models.test_modeling_avit import lively_avit
from tests.utils import FIXTURES, lively_model


REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [
    REPOSITORY / "README.md",
    *(
        REPOSITORY / "docs" / name
        for name in ("adapters.md", "converting.md", "extending.md", "inference.md", "models.md")
    ),
    *sorted(REPOSITORY.glob("examples/checkpoints/*/README.md")),
]


def snippets(document: Path) -> list[tuple[int, str]]:
    """Line number and code of each Python block, at any indentation."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        (text.count("\n", 0, match.start()) + 2, re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE))
        for match in found
    ]


SNIPPETS = [
    pytest.param(document, line, code, id=f"{document.relative_to(REPOSITORY)}:{line}")
    for document in DOCUMENTS
    for line, code in snippets(document)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    A working directory with `examples` and, under the names that the snippets use, small models instead of those that
    the quickstart trains or the Hub holds: `from_pretrained` reads a folder of that name first.
    """
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    with Image.open(REPOSITORY / "examples/images/horse.png") as image:
        image.save(folder / "image.jpg")
    # In half precision, as the shipped models are.
    lively_model(thinking_stages=[1, 2], hidden_size=16, num_hidden_layers=1).half().save_pretrained(
        folder / "outputs/quickstart"
    )
    evaluation_image_processor(32).save_pretrained(folder / "outputs/quickstart")
    lively_avit(num_hidden_layers=12).save_pretrained(folder / "path/to/avit")
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 48}
    deit = DeiTForImageClassification(DeiTConfig(**sizes, image_size=32, patch_size=16))
    deit.save_pretrained(folder / "facebook/deit-tiny-patch16-224")
    shutil.copytree(FIXTURES / "thinkingvit_2stage", folder / "NCPS/thinkingvit_deit-3h-6h-imagenet1k")
    return folder


def given(folder: Path) -> dict:
    """The variables that the text around a snippet assumes: a model with its processor, and a few images."""
    model = AutoModelForImageClassification.from_pretrained(folder / "outputs/quickstart")
    processor = AutoImageProcessor.from_pretrained(folder / "outputs/quickstart")
    paths = sorted(str(path) for path in (REPOSITORY / "examples/images").glob("*.png"))[:3]
    images = [Image.open(path) for path in paths]
    return {
        "model": model,
        "processor": processor,
        "paths": paths,
        "images": images,
        "pixel_values": processor(images[:1], return_tensors="pt")["pixel_values"],
    }


def test_snippets_are_found():
    per_document = [len(snippets(document)) for document in DOCUMENTS]
    assert per_document[0] >= 2
    assert min(per_document) >= 1
    assert sum(per_document) == sum(document.read_text(encoding="utf-8").count("```python") for document in DOCUMENTS)


@pytest.mark.parametrize("document, line, code", SNIPPETS)
@torch.no_grad()
def test_runs(document, line, code, folder, monkeypatch):
    needed = {"onnx": ("onnxscript", "onnxruntime"), "peft": ("peft",), "torchao": ("torchao",)}
    for name in (name for word, names in needed.items() if word in code for name in names):
        pytest.importorskip(name)
    monkeypatch.chdir(folder)
    with patch.dict(EXIT_CRITERIA):  # a guide registers a criterion
        # Padded with empty lines, so that tracebacks have the line numbers of the document.
        exec(compile("\n" * (line - 1) + code, document, "exec"), given(folder))
