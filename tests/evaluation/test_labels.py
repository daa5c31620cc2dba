import argparse
import json

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig

from hf_thinkingvit.conversion.labels import imagenet_1k_classes
from hf_thinkingvit.evaluation import LabelMap, evaluate_accuracy, label_map_argument
from tests.utils import lively_model, random_images


CRANES = ["crane", "owl", "crane", "maillot"]


def config(names: list[str], **fields) -> PreTrainedConfig:
    """A configuration whose `label2id` is the inverted dict: for a shared name, the last of its classes."""
    fields = {"label2id": {name: index for index, name in enumerate(names)}, **fields}
    return PreTrainedConfig(id2label=dict(enumerate(names)), **fields)


def table(names: list[str], label_names: list[str], label_map=None, **fields) -> list[int]:
    return LabelMap(config(names, **fields), label_names, label_map, name="birds").table.tolist()


def test_answers_that_are_no_numbers_are_wrong():
    """They are wrong for every label, although `topk` ranks NaN highest."""
    labels = LabelMap(config(["a", "b", "c"]), ["a", "b", "c"])
    truth = torch.arange(3)
    assert not labels.hits(torch.full((3, 3), torch.nan), truth, 1).any()
    spoilt = torch.eye(3)
    spoilt[1, 1], spoilt[2, 0] = torch.inf, torch.nan
    for top_k in (1, 3):
        assert labels.hits(spoilt, truth, top_k).tolist() == [True, False, False]
    some = LabelMap(config(["a", "b", "c"]), ["a", "b"], restrict=True)  # other classes get -inf
    assert some.hits(torch.eye(3), torch.tensor([0, 1, 0]), 1).tolist() == [True, True, True]


def test_a_model_that_answers_nan_is_never_right():
    network = lively_model(thinking_stages=[2, 4])
    torch.nn.init.constant_(network.classifier.weight, torch.nan)
    labels = torch.arange(network.config.num_labels)
    batches = [{"pixel_values": random_images(len(labels)), "labels": labels}]
    measured = evaluate_accuracy(Accelerator(cpu=True), {"it": network}, batches)["it"]
    assert measured["top1"] == measured["top5"] == [0.0, 0.0]


class TestRepeatedNames:
    def test_the_class_at_the_same_place(self):
        assert table(CRANES, CRANES) == [0, 1, 2, 3]
        assert table(CRANES, ["crane", "owl", "maillot"]) == [0, 1, 3]
        labels = LabelMap(config(CRANES), CRANES)
        assert labels.hits(torch.eye(4), torch.arange(4), top_k=1).tolist() == [True] * 4

    def test_as_often_on_both_sides_and_at_other_places(self):
        assert table(CRANES, ["owl", "crane", "maillot", "crane"]) == [1, 0, 3, 2]

    @pytest.mark.parametrize(
        "label_names", [["owl", "crane"], ["owl", "crane", "crane", "crane"], ["owl", "maillot", "crane", "crane"]]
    )
    def test_refuses_to_guess(self, label_names):
        """Fewer labels than classes of a name, more, or only some at the same index."""
        with pytest.raises(ValueError, match=r"'crane' is the name of the labels \[.*of birds.*classes \[0, 2\]"):
            table(CRANES, label_names)

    def test_refuses_two_labels_for_one_class(self):
        with pytest.raises(ValueError, match=r"'owl' is the name of the labels \[0, 1\].*model's classes \[1\]"):
            table(CRANES, ["owl", "owl"])

    def test_a_map_says_which(self):
        assert table(CRANES, ["Kranich", "Kran"], {"Kranich": 0, "Kran": 2}) == [0, 2]
        assert table(CRANES, ["c", "c"], {0: 2, 1: 0}) == [2, 0]
        assert table(CRANES, ["c", "c"], {"0": 2, "1": "owl"}) == [2, 1]  # JSON keys are strings
        with pytest.raises(ValueError, match=r"maps 'Kran' to 'crane', which is the name of .* \[0, 2\]"):
            table(CRANES, ["Kran"], {"Kran": "crane"})
        with pytest.raises(ValueError, match=r"maps 'c', which is the name of several labels of birds"):
            table(CRANES, ["c", "c"], {"c": 2})

    def test_by_index(self):
        assert table(CRANES, ["d", "c", "c", "crane"], "index") == [0, 1, 2, 3]


class TestLabel2Id:
    @pytest.mark.parametrize("label2id", [None, {}, {"owl": 1}])
    def test_missing_or_short(self, label2id):
        assert table(["cat", "owl", "dog"], ["dog", "cat", "owl"], label2id=label2id) == [2, 0, 1]

    def test_further_names_of_classes(self):
        names = {"cat": 0, "owl": 1, "Strigiformes": 1}
        assert table(["cat", "owl"], ["Strigiformes", "cat"], label2id=names) == [1, 0]

    def test_refuses_what_contradicts_id2label(self):
        with pytest.raises(ValueError, match=r"`label2id` says that 'cat' is class 1, but `id2label` says \[0\]"):
            table(["cat", "owl"], ["cat", "owl"], label2id={"cat": 1, "owl": 0})
        with pytest.raises(ValueError, match=r"'cow' is class 7, but `id2label` says nothing of it"):
            table(["cat", "owl"], ["cat", "owl"], label2id={"cow": 7})

    def test_refuses_classes_that_are_not_numbered_from_0(self):
        with pytest.raises(ValueError, match=r"must name its classes from 0 on, got names for \[1, 2\]"):
            LabelMap(PreTrainedConfig(id2label={1: "cat", 2: "owl"}), ["cat"])


def test_imagenet_needs_no_map_and_short_names_are_not_guessed():
    names = imagenet_1k_classes()
    assert table(names, names) == list(range(1000))
    with pytest.raises(ValueError, match=r"1 labels of birds match no class of the model, such as \['tabby'\]"):
        table(names, ["tabby"])


class TestArgument:
    def test_index_or_a_file(self, tmp_path):
        (tmp_path / "map.json").write_text(json.dumps({"n3": "owl", "4": 2}))
        assert label_map_argument("index") == "index"
        assert label_map_argument(str(tmp_path / "map.json")) == {"n3": "owl", "4": 2}

    @pytest.mark.parametrize("content", [None, "{", "[1]", '{"a": null}', '{"a": true}'])
    def test_refuses_anything_else(self, content, tmp_path):
        if content is not None:
            (tmp_path / "map.json").write_text(content)
        with pytest.raises(argparse.ArgumentTypeError, match=r"map\.json"):
            label_map_argument(str(tmp_path / "map.json"))
