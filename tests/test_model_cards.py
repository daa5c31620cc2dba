"""Model cards made from results."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_thinkingvit.evaluation import stage_macs
from hf_thinkingvit.hub import accuracy_results, model_card
from hf_thinkingvit.image_processing import evaluation_image_processor
from tests.hub_results import results, staged, sweep
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_swin


def metrics(card: ModelCard) -> dict[str, float]:
    return {result.metric_name: result.metric_value for result in card.data.eval_results or []}


class TestCard:
    def test_shows_what_was_measured(self):
        text = str(model_card(staged(), results(plot=None), name="animals", source="org/animals-vit"))
        assert "On 4321 images of `org/animals`, split `test`." in text
        assert "| stage 0 | 61.50 | 90.25 | 0.25 |" in text and "| stage 1 | 72.12 | 95.00 | 1.5 |" in text
        assert "| 0.3 | 77.00 | 95.00 | 0.5 | 25.0 % | 75.0 % |" in text
        assert "It keeps the promise." in text and "* ε, the greatest risk asked for: 0.01" in text
        assert "* epochs: 7" in text and "batch size" not in text

    def test_metadata_for_the_hub(self):
        card = model_card(staged(), results(), name="animals", license="mit", datasets="org/animals")
        card = ModelCard(str(card))  # as the Hub reads it
        data = card.data.to_dict()
        assert (data["pipeline_tag"], data["library_name"]) == ("image-classification", "transformers")
        assert (data["license"], data["datasets"]) == ("mit", ["org/animals"])
        assert {result.dataset_split for result in card.data.eval_results} == {"test"}
        assert metrics(card) == {
            "top-1 accuracy, every image through all stages": 72.12,
            "top-5 accuracy, every image through all stages": 95,
            "top-1 accuracy at τ = 0.5": 75,
            "top-5 accuracy at τ = 0.5": 95.0,
        }

    def test_stage_schedule_is_that_of_the_configuration(self):
        model = staged(thinking_stages=[1, 2, 4], threshold=[0.5, 0.25])
        first, second, third = stage_macs(model.config)
        text = str(model_card(model, name="animals"))
        assert f"| stage 1 | 2 | 16 | {(first + second) / 1e9:.4g} |" in text
        assert f"| stage 2 | 4 | 32 | {(first + second + third) / 1e9:.4g} |" in text
        assert "The configuration has τ = 0.5, 0.25." in text

    def test_stage_schedule_of_a_hierarchy(self):
        model = lively_swin(head_rounds=[[1, 2], [2, 4]])
        first, second = stage_macs(model.config)
        text = str(model_card(model, name="animals"))
        assert f"| stage 0 | 1, 2 | 8 | {first / 1e9:.4g} |" in text
        assert f"| stage 1 | 2, 4 | 16 | {(first + second) / 1e9:.4g} |" in text
        assert "on a Swin Transformer" in text and "32 × 32 pixels" in text and "patches of 4 × 4 pixels" in text
        assert "2 layers of 2 and 1 blocks" in text

    def test_usage_runs(self, tmp_path):
        for model in (staged(), lively_swin(), lively_avit()):
            folder = tmp_path / model.config.model_type
            model.save_pretrained(folder)
            evaluation_image_processor(32).save_pretrained(folder)
            text = str(model_card(model, name="animals", source=str(folder)))
            code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
            assert "from_pretrained" in code and "pipeline(" in code
            image = tmp_path / "image.jpg"
            Image.new("RGB", (40, 40)).save(image)
            names = {}
            exec(code.replace('"image.jpg"', repr(str(image))), names)
            assert type(names["model"]) is type(model)

    @pytest.mark.parametrize("make", [staged, lively_swin, lively_avit])
    def test_leaves_out_what_was_not_measured(self, make):
        model = make()
        card = model_card(model, name="animals")
        headings = re.findall("^## (.*)", str(card), re.MULTILINE)
        assert headings == ["Use", *([] if make is lively_avit else ["Stages"]), "Limits", "Citation"]
        assert not {"model-index", "license", "datasets", "model_name"} & card.data.to_dict().keys()
        for empty in ("None", "N/A", "nan", "Undefined", "![", "\n\n\n"):
            assert empty not in str(card)

    def test_leaves_out_a_column_that_not_every_row_has(self):
        rows = sweep(3)
        del rows[1]["gmacs"], rows[2]["exit_shares"]
        text = str(model_card(staged(), results(sweep=rows, stages=None), name="animals"))
        assert "| τ | top-1 (%) | top-5 (%) |\n" in text

    def test_says_nothing_of_tau_where_there_is_none(self):
        text = str(model_card(staged(thinking_stages=[4]), name="animals"))
        assert "| stage 0 | 4 | 32 |" in text and "τ = " not in text and "from_pretrained(" not in text

    @pytest.mark.parametrize("stages", [[2, 4], [4]])
    def test_says_which_patches_are_removed(self, stages):
        pruning = {"pruning_layers": [1, 2], "pruning_keep_rate": 0.5}
        model = staged(thinking_stages=stages, **pruning)
        measured = {"top1": [60.0] * len(stages), "top5": [90.0] * len(stages), "images": 10}
        found = accuracy_results(model, measured, "digits")
        text = str(model_card(model, found, name="animals"))
        assert "before layers 1, 2 (counted from 0): 50, 25 % of the image's patches remain" in text
        assert f"| {sum(stage_macs(model.config)) / 1e9:.4g} |" in text and "\n\n\n" not in text
        assert "remain" not in str(model_card(staged(), name="animals"))
        model.config.pruning_keep_rate = 0.75
        with pytest.raises(ValueError, match="measured with `pruning_keep_rate` = 0.5, but the model's is 0.75"):
            model_card(model, found, name="animals")

    def test_shows_a_long_sweep_at_even_distances_and_at_the_models_threshold(self):
        text = str(model_card(staged(threshold=9.9), results(sweep=sweep(201)[:80]), name="animals"))
        assert "12 of 80 thresholds" in text
        rows = re.findall(r"^\| ([\d.]+) \| \d+\.00 \|", text, re.MULTILINE)
        assert (len(rows), rows[0], rows[-1]) == (12, "0", "7.9")
        text = str(model_card(staged(threshold=[0.5]), results(sweep=sweep(80)), name="animals"))
        assert "13 of 80 thresholds" in text and "| **0.5** (as configured) | 75.00 |" in text

    def test_of_what_training_evaluates(self):
        model = staged()
        measured = {"top1": [50.0, 60.0], "top5": [100.0, 100.0], "images": 10}
        card = model_card(model, accuracy_results(model, measured, "digits", split=None), name="digits")
        first, second = stage_macs(model.config)
        assert f"| stage 1 | 60.00 | 100.00 | {(first + second) / 1e9:.4g} |" in str(card)
        model = lively_avit()
        measured = {"top1": [50.0], "top5": [70.0], "images": 10, "mean_depth": 3.25, "macs": 2.5e8}
        card = model_card(model, accuracy_results(model, measured, "digits", training={"seed": 0}), name="digits")
        assert "| 50.00 | 70.00 | 3.25 | 0.25 |" in str(card) and "* seed: 0" in str(card)
        assert metrics(card) == {"top-1 accuracy": 50.0, "top-5 accuracy": 70.0}

    def test_card_of_the_official_model_claims_no_figure(self):
        card = ModelCard((Path(__file__).parents[1] / "MODEL_CARD.md").read_text(encoding="utf-8"))
        data = card.data.to_dict()
        assert (data["pipeline_tag"], data["library_name"]) == ("image-classification", "transformers")
        assert "model-index" not in data
        assert "the authors' own" in card.text


class TestBadResults:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"dataset": None}, "`dataset` must name what the results were measured on"),
            ({"images": 0}, "`images` must be an integer of at least 1"),
            ({"stages": [{"top1": 50}] * 3}, "The results are of 3 stages, but the model has 2"),
            ({"stages": "60"}, "`stages` of the results must be a sequence"),
            ({"stages": [{"top1": 50}, {"top5": 50}]}, r"`stages\[1\]` of the results must be a mapping with `top1`"),
            (
                {"stages": [{"top1": 50}, {"top1": float("nan")}]},
                r"`stages\[1\].top1` must be a number between 0 and 100",
            ),
            ({"sweep": [{"top1": 50}]}, r"`sweep\[0\]` of the results: `threshold` must be a number"),
            ({"sweep": [{"threshold": [1, 2], "top1": 50}]}, r"`sweep\[0\]` .* a list of 1, one per exit"),
            ({"sweep": [{"threshold": 1, "top1": 5, "exit_shares": [1]}]}, "must have 2 entries, one per stage"),
            ({"sweep": [{"threshold": 1, "top1": 5, "exit_shares": [0.5, 0.4]}]}, "must sum to 1"),
            ({"calibration": {"threshold": "0.5"}}, "`calibration` of the results: `threshold` must be a number"),
            ({"criterion": "margin"}, "measured with the criterion 'margin', but the model's `exit_criterion` is"),
            ({"plot": "missing.png"}, "`plot` must name a picture"),
            ({"plot": "config.json"}, "`plot` must name a picture"),
        ],
    )
    def test_one_clear_error(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            model_card(staged(), results(**overrides), name="animals")

    def test_stages_of_a_model_without(self):
        with pytest.raises(ValueError, match="thinks in stages, which `avit` does not"):
            model_card(lively_avit(), results(), name="animals")

    @pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe"])
    def test_unreadable_file(self, content, tmp_path):
        path = tmp_path / "results.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"results file .*results\.json"):
            model_card(staged(), path, name="animals")
