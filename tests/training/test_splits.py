"""The images by which the best epoch is chosen, and the images on which accuracy is reported."""

import hashlib
import json
import math

import datasets
import pytest
from transformers import AutoModelForImageClassification

from hf_thinkingvit.data import evaluation_batches
from hf_thinkingvit.evaluation.accuracy import evaluate_accuracy
from hf_thinkingvit.public_names import public_name
from hf_thinkingvit.training import TrainingConfig, TrainingRun, parse_config, train
from hf_thinkingvit.training.continuation import as_begun
from hf_thinkingvit.training.data import load_data
from tests.training.tiny_runs import LABELS, encoded_image, flags


def write(folder, labels_of_split: dict[str, list[int]]):
    """Parquet files of images, each named after its split and index."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=LABELS)})
    folder.mkdir(exist_ok=True)
    for number, (split, labels) in enumerate(labels_of_split.items()):
        files = [encoded_image(1000 * number + index) for index in range(len(labels))]
        images = [{"bytes": file, "path": f"{split}-{index}.png"} for index, file in enumerate(files)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def paths(split) -> list[str]:
    return [row["image"]["path"] for row in split.rows]


def read(folder, **overrides):
    return load_data(TrainingConfig(dataset=str(folder), **overrides))


@pytest.fixture(scope="module")
def train_and_test(tmp_path_factory):
    """40 images to train on, of labels 0, 1 and 2 in the ratio 2 : 1 : 1, and 10 to test on."""
    return write(tmp_path_factory.mktemp("a"), {"train": [0, 1, 0, 2] * 10, "test": [0, 1] * 5})


class TestHoldingOut:
    def test_images_of_train_choose_and_test_is_reported(self, train_and_test):
        data = read(train_and_test, validation_fraction=0.2)
        chosen, learned = paths(data.evaluation), paths(data.train)
        assert (len(chosen), len(learned), len(data.test.rows)) == (8, 32, 10)
        assert not set(chosen) & set(learned)
        assert set(chosen) | set(learned) == {f"train-{index}.png" for index in range(40)}
        assert (data.selected_on, data.split) == ("held out from train", "test")
        # Stratified, and each part in the order of the data.
        assert sorted(row["label"] for row in data.evaluation.rows) == [0, 0, 0, 0, 1, 1, 2, 2]
        for part in (chosen, learned):
            assert part == sorted(part, key=lambda path: int(path[6:-4]))
        assert chosen != [f"train-{index}.png" for index in range(8)]

    def test_are_the_same_whatever_the_seed_and_the_samples(self, train_and_test):
        first = read(train_and_test)
        for overrides in ({}, {"seed": 7}, {"max_train_samples": 5}):
            assert paths(read(train_and_test, **overrides).evaluation) == paths(first.evaluation)
        assert len(first.evaluation.rows) == 4  # a tenth
        assert paths(read(train_and_test, max_train_samples=5).train) == paths(first.train)[:5]

    @pytest.mark.parametrize("labels", [[0, 1, 0, 2] * 10, sorted([0, 1, 0, 2] * 10), [0] * 36 + [1] * 3 + [2]])
    def test_smaller_sets_lie_within_larger_ones(self, tmp_path, labels):
        """A run that starts from another's model, and holds out no more, chooses by images that neither trained on."""
        folder = write(tmp_path, {"train": labels})
        larger: set[str] = set(paths(read(folder, validation_fraction=0.9).evaluation))
        for fraction in (0.5, 0.3, 0.2, 0.1, 0.05, 0.01):
            data = read(folder, validation_fraction=fraction)
            held_out = set(paths(data.evaluation))
            assert len(held_out) == math.ceil(fraction * 40)
            assert held_out < larger
            assert not held_out & set(paths(data.train))
            larger = held_out

    def test_fewer_samples_are_of_all_labels(self, tmp_path):
        """Even if the data are sorted by label."""
        folder = write(tmp_path, {"train": [0] * 20 + [1] * 10 + [2] * 10})
        data = read(folder, validation_fraction=0.4, max_eval_samples=8)
        assert sorted(row["label"] for row in data.evaluation.rows) == [0, 0, 0, 0, 1, 1, 2, 2]
        whole = read(folder, validation_fraction=0.4)
        assert set(paths(data.evaluation)) < set(paths(whole.evaluation))
        assert paths(data.train) == paths(whole.train)

    def test_a_starting_point_must_not_have_learned_them(self, train_and_test, tmp_path, capsys):
        words = flags(train_and_test, tmp_path / "a", max_steps=1)
        train(parse_config(words))
        for more in ([], ["--eval_split", "none"]):
            again = flags(train_and_test, tmp_path / "b", from_pretrained=tmp_path / "a" / "last")
            TrainingRun(parse_config([*again, *more]))
            said = "must not have learned the images that are held out" in capsys.readouterr().out
            assert said == bool(more)

    def test_a_label_with_one_image(self, tmp_path):
        data = read(write(tmp_path, {"train": [0] * 9 + [1]}), validation_fraction=0.3)
        assert (len(data.evaluation.rows), len(data.train.rows)) == (3, 7)
        # Without a test split, accuracy is reported on the split that chooses the epoch.
        assert data.test is None
        assert data.split == data.selected_on == "held out from train"

    def test_leaves_something_to_train_on(self, tmp_path):
        folder = write(tmp_path, {"train": [0]})
        with pytest.raises(ValueError, match="Holding 1 of the 1 training images .* lower `validation_fraction`"):
            read(folder)

    def test_a_stream_must_name_its_split(self, train_and_test):
        with pytest.raises(ValueError, match="no images can be held out of a stream: name an `eval_split`"):
            read(train_and_test, streaming=True)
        data = read(train_and_test, streaming=True, eval_split="test")
        assert (data.selected_on, data.split, data.test) == ("test", "test", None)

    def test_a_share_is_checked(self):
        for fraction in (-0.1, 1.0):
            with pytest.raises(ValueError, match="`validation_fraction`"):
                TrainingConfig(validation_fraction=fraction).check()


class TestNamedSplits:
    def test_test_may_choose_if_it_is_named(self, train_and_test):
        for overrides in ({"eval_split": "test"}, {"validation_fraction": 0.0}):
            data = read(train_and_test, **overrides)
            assert len(data.train.rows) == 40
            assert (data.selected_on, data.split, data.test) == ("test", "test", None)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_validation_split_chooses_and_test_is_reported(self, tmp_path, streaming):
        folder = write(tmp_path, {"train": [0, 1] * 4, "validation": [1] * 3, "test": [0] * 2})
        data = read(folder, streaming=streaming)
        assert (data.selected_on, data.split) == ("validation", "test")
        assert len(paths(data.train)) == 8
        assert paths(data.evaluation)[0] == "validation-0.png"
        assert paths(data.test) == ["test-0.png", "test-1.png"]
        assert len(paths(read(folder, streaming=streaming, max_eval_samples=1).test)) == 1

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_test_split_without_labels_is_not_reported(self, tmp_path, streaming):
        """The test split of ImageNet-1K on the Hub has none."""
        folder = write(tmp_path, {"train": [0, 1] * 4, "validation": [1] * 3, "test": [-1] * 2})
        data = read(folder, streaming=streaming)
        assert (data.selected_on, data.split, data.test) == ("validation", "validation", None)
        with pytest.raises(ValueError, match="split 'test' .* have no labels"):
            read(folder, streaming=streaming, test_split="test")

    def test_another_split_may_be_reported(self, tmp_path):
        folder = write(tmp_path, {"train": [0, 1] * 4, "validation": [1] * 3, "test": [0] * 2})
        data = read(folder, eval_split="test", test_split="validation")
        assert (data.selected_on, data.split, len(data.test.rows)) == ("test", "validation", 3)
        data = read(folder, test_split="validation")
        assert (data.split, data.test) == ("validation", None)
        with pytest.raises(ValueError, match="no split 'nosuch'"):
            read(folder, test_split="nosuch")

    def test_images_that_are_learned_are_not_reported(self, train_and_test):
        with pytest.raises(ValueError, match="`test_split` is 'train', which the run learns from"):
            read(train_and_test, test_split="train")
        # If another split chooses the epoch, training images may be reported.
        assert read(train_and_test, eval_split="test", test_split="train").split == "train"


class TestOutcome:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, train_and_test, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        words = flags(train_and_test, folder, validation_fraction=0.2, epochs=4)
        position = words.index("--eval_split")
        del words[position : position + 2]
        return folder, words, train(parse_config(words))

    def test_results_say_which_images_are_which(self, run):
        folder, _, results = run
        assert results == json.loads((folder / "results.json").read_text())
        assert (results["selected_on"], results["split"]) == ("held out from train", "test")
        assert all(m["images"] == 8 for entry in results["history"] for m in entry["results"].values())
        assert {name: entry["images"] for name, entry in results["test"].items()} == {"best": 10, "last": 10}
        assert results["test"]["last"]["step"] == results["step"] == 16
        top1 = [entry["results"][entry["chosen"]]["top1"][-1] for entry in results["history"]]
        assert results["test"]["best"]["step"] == results["history"][top1.index(max(top1))]["step"]

    def test_what_is_reported_is_of_the_saved_models(self, run):
        folder, words, results = run
        again = TrainingRun(parse_config([*words, "--resume", "auto"]))
        for name in ("best", "last"):
            model = AutoModelForImageClassification.from_pretrained(folder / name)
            batches = again.accelerator.prepare(evaluation_batches(again.data.test, again.processor, 4))
            measured = evaluate_accuracy(again.accelerator, {"it": model}, batches)["it"]
            assert measured["top1"] == results["test"][name]["top1"]
            card = (folder / name / "README.md").read_text()
            assert "On 10 images of" in card
            assert "split `test`" in card
            assert "best epoch was chosen by its accuracy on `held out from train`" in card
            assert f"| stage 1 | {measured['top1'][-1]:.2f} |" in card
            assert "split: test\n" in card  # in the model index

    def test_saved_models_record_the_images_that_made_them(self, run, train_and_test, tmp_path):
        folder, _, _ = run
        name = public_name(str(train_and_test))
        for saved in ("best", "last"):
            config = AutoModelForImageClassification.from_pretrained(folder / saved).config
            recorded = {"dataset": name, "split": "train", "selected_on": "held out from train"}
            assert config.training_data == recorded
        # A run that starts from such a model records its own split.
        train(parse_config(flags(train_and_test, tmp_path, max_steps=1, from_pretrained=folder / "best")))
        config = AutoModelForImageClassification.from_pretrained(tmp_path / "best").config
        assert config.training_data == {"dataset": name, "split": "train", "selected_on": "test"}

    def test_a_finished_run_reports_the_same_again(self, run):
        _, words, results = run
        again = train(parse_config([*words, "--resume", "auto"]))
        assert again["test"] == results["test"]

    def test_the_images_held_out_belong_to_the_run(self, run):
        _, words, _ = run
        with pytest.raises(ValueError, match=r"another run \(validation_fraction: 0\.2 then, 0\.1 now\)"):
            TrainingRun(parse_config([*words, "--resume", "auto", "--validation_fraction", "0.1"]))

    def test_choosing_by_what_is_reported_is_said(self, train_and_test, tmp_path, capsys):
        results = train(parse_config(flags(train_and_test, tmp_path, max_steps=1)))
        assert (results["selected_on"], results["split"], results["test"]) == ("test", "test", None)
        card = (tmp_path / "best" / "README.md").read_text()
        assert "best epoch was chosen on these images, so the figures are optimistic" in card
        assert "chosen by the images that are reported (`test`)" in capsys.readouterr().out

    def test_a_run_of_a_version_that_held_nothing_out_goes_on(self, train_and_test, tmp_path):
        words = flags(train_and_test, tmp_path, max_steps=1, validation_fraction=0)
        position = words.index("--eval_split")
        del words[position : position + 2]
        train(parse_config(words))
        progress = tmp_path / "checkpoints" / "step-00000001" / "progress.json"
        saved = json.loads(progress.read_text())
        for name in ("validation_fraction", "test_split", "label_map"):
            del saved["config"][name]
        written = json.dumps(saved).encode()
        progress.write_bytes(written)
        manifest = json.loads((progress.parent / "manifest.json").read_text())
        manifest["progress.json"] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        (progress.parent / "manifest.json").write_text(json.dumps(manifest))
        words = words[: words.index("--validation_fraction")] + words[words.index("--validation_fraction") + 2 :]
        config = as_begun(parse_config([*words, "--resume", "auto"]))
        assert config.validation_fraction == 0.0
        assert len(load_data(config).train.rows) == 40
        assert TrainingRun(parse_config([*words, "--resume", "auto"])).progress.step == 1
