"""
examples/classify_ray.py on a local Ray: Parquet in and out with a pool of actors, and a folder read by Ray. One job has
actors, since each of them is a process that imports torch.
"""

import io
import runpy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.models.image_files import read_image
from tests.inference.conftest import NETWORKS, with_exits
from tests.training.tiny_runs import encoded_image


ray = pytest.importorskip("ray", reason="the example needs ray[data]")
pd = pytest.importorskip("pandas", reason="the example needs ray[data]")

EXAMPLE = Path(__file__).parents[1] / "examples" / "classify_ray.py"
COUNT, BROKEN = 12, 3


@pytest.fixture(scope="module")
def local_ray():
    """Its workers inherit this process's environment."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=10**8,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE), run_name="classify_ray")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its folder, and image files in a folder and its subfolder, one of which is broken."""
    root = tmp_path_factory.mktemp("ray")
    model = with_exits(NETWORKS["vit"]())
    model.save_pretrained(root / "model")
    evaluation_image_processor(32).save_pretrained(root / "model")
    images = root / "images"
    (images / "more").mkdir(parents=True)
    names = [images / "more" / f"{n}.png" if n % 2 else images / f"{n}.png" for n in range(COUNT)]
    for n, name in enumerate(names):
        name.write_bytes(b"no image" if n == BROKEN else encoded_image(n))
    (images / "notes.txt").write_text("no image either, by its name")
    return model, root, names


def assert_answers(rows, names, network, **arguments) -> None:
    """`rows` has the model's own answer to each image, in their order, and an error for the broken one."""
    processor = evaluation_image_processor(32)
    assert len(rows) == COUNT
    for n, (name, row) in enumerate(zip(names, rows)):
        if n == BROKEN:
            assert "Cannot read the image" in row["error"] and row["exit_stage"] == -1
            continue
        with torch.no_grad():
            expected = network(**processor(read_image(name), return_tensors="pt"), **arguments)
        assert (row["exit_stage"], row["error"]) == (expected.exit_stage.item(), "")
        assert row["predicted_label"] == network.config.id2label[expected.logits.argmax().item()]
        assert row["predicted_score"] == pytest.approx(expected.logits.softmax(dim=-1).max().item(), abs=1e-4)
        assert row["entropy"] == pytest.approx(expected.entropy.item(), abs=1e-4)


def test_parquet_in_and_out(local_ray, example, saved, tmp_path):
    network, root, names = saved
    truth = {"number": list(range(COUNT)), "label": list(range(COUNT)), "score": [0.5] * COUNT}
    kinds = {"image": Image(), "number": Value("int64"), "label": Value("int64"), "score": Value("float64")}
    rows = {"image": [{"bytes": name.read_bytes()} for name in names], **truth}
    Dataset.from_dict(rows, Features(kinds)).to_parquet(tmp_path / "images.parquet")
    example["classify"](
        str(root / "model"), str(tmp_path / "images.parquet"), str(tmp_path / "found"), batch_size=4, threshold=0.9
    )
    found = pd.read_parquet(tmp_path / "found").sort_values("number")
    assert list(found.columns) == [*truth, *example["ANSWERS"]]
    assert found[list(truth)].to_dict("list") == truth  # columns of the input are what they were
    assert_answers(found.to_dict("records"), names, network, threshold=0.9)
    with pytest.raises(ValueError, match="has no column 'picture'"):
        example["read"](str(tmp_path / "images.parquet"), "picture")
    with pytest.raises(FileExistsError, match="not an empty folder"):  # and before anything is read
        example["classify"](str(root / "model"), "no data", str(tmp_path / "found"))
    found.assign(image=b"").to_parquet(tmp_path / "again.parquet")
    with pytest.raises(ValueError, match=r"\['entropy', .*'predicted_score'\], which are those of the answers"):
        example["read"](str(tmp_path / "again.parquet"), None)


def test_a_folder_with_its_subfolders(local_ray, example, saved):
    """Read by Ray; the class that lives in an actor answers here."""
    network, root, names = saved
    rows, column = example["read"](str(root / "images"), None)
    batch = {
        name: np.array(values, dtype=object) for name, values in pd.DataFrame(rows.take_all()).to_dict("list").items()
    }
    classifier = example["Classifier"](str(root / "model"), column, batch_size=4, threshold=None, precision=None)
    found = pd.DataFrame(classifier(batch)).set_index("path")
    assert len(found) == COUNT and column not in found.columns
    assert_answers([found.loc[str(name)] for name in names], names, network)


def test_only_photographs_are_opened(example):
    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(content, "eps")  # which Pillow would have drawn by Ghostscript
    with pytest.raises(ValueError, match="none of the formats JPEG, PNG, "):
        example["decode"]({"bytes": content.getvalue()})


@pytest.mark.parametrize("exported, cpus, threads", [(True, 3, 3), (True, 0.5, 1), (False, 3, None)])
def test_an_exported_model_has_as_many_threads_as_its_actor_has_cpus(
    exported, cpus, threads, example, monkeypatch, tmp_path
):
    """PyTorch is told by Ray, and a folder of weights takes no `threads`."""

    class Loaded(Exception):
        pass

    class Rows:
        def map_batches(self, actor, fn_constructor_args, **options):
            actor(*fn_constructor_args)

    def load_classifier(*arguments):
        raise Loaded(*arguments)

    scope = example["classify"].__globals__
    monkeypatch.setitem(scope, "read", lambda dataset, column: (Rows(), "image"))
    monkeypatch.setitem(scope, "is_exported", lambda model: exported)
    monkeypatch.setitem(scope, "load_classifier", load_classifier)
    with pytest.raises(Loaded) as loaded:
        example["classify"]("model", "data", str(tmp_path / "new"), cpus=cpus, precision="bf16")
    assert loaded.value.args == ("model", "bf16", threads)
