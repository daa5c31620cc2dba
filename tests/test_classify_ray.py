"""examples/classify_ray.py on a local Ray, with a model's folder, images in a folder and in Parquet."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image

from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.models.image_files import read_image
from tests.inference.conftest import NETWORKS, with_exits
from tests.training.tiny_runs import encoded_image


ray = pytest.importorskip("ray", reason="the example needs ray[data]")
pd = pytest.importorskip("pandas", reason="the example needs ray[data]")

EXAMPLE = Path(__file__).parents[1] / "examples" / "classify_ray.py"


@pytest.fixture(scope="module")
def local_ray():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=10**8,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "model"
    model = with_exits(NETWORKS["vit"]())
    model.save_pretrained(folder)
    evaluation_image_processor(32).save_pretrained(folder)
    return model, folder


def test_a_folder_and_parquet(local_ray, model, tmp_path):
    """The same answers as the model's own, for every image, from a folder and from Parquet."""
    network, folder = model
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    names = [images / "more" / f"{n}.png" if n % 2 else images / f"{n}.png" for n in range(12)]
    for n, name in enumerate(names):
        name.write_bytes(encoded_image(n))
    names[3].write_bytes(b"no image")
    classify = runpy.run_path(str(EXAMPLE), run_name="classify_ray")["classify"]
    classify(str(folder), str(images), str(tmp_path / "from_folder"), batch_size=4)
    found = pd.read_parquet(tmp_path / "from_folder").set_index("path")
    assert len(found) == 12
    processor = evaluation_image_processor(32)
    for name in names:
        row = found.loc[str(name)]
        if name == names[3]:
            assert "Cannot read the image" in row.error and row.exit_stage == -1
            continue
        with torch.no_grad():
            expected = network(**processor(read_image(name), return_tensors="pt"))
        assert row.exit_stage == expected.exit_stage.item()
        assert row.label == network.config.id2label[expected.logits.argmax().item()]
        assert row.score == pytest.approx(expected.logits.softmax(dim=-1).max().item(), abs=1e-4)

    rows = {"image": [{"bytes": name.read_bytes()} for name in names], "number": list(range(12))}
    features = Features({"image": Image(), "number": Dataset.from_dict({"number": [0]}).features["number"]})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "images.parquet")
    classify(str(folder), str(tmp_path / "images.parquet"), str(tmp_path / "from_parquet"), batch_size=4, threshold=0.0)
    found = pd.read_parquet(tmp_path / "from_parquet").set_index("number").sort_index()
    assert list(found.columns) == ["label", "score", "exit_stage", "entropy", "error"]
    assert found.exit_stage.tolist() == [-1 if n == 3 else 2 for n in range(12)]
    with pytest.raises(ValueError, match="has no column 'picture'"):
        classify(str(folder), str(tmp_path / "images.parquet"), str(tmp_path / "x"), column="picture")
