"""Answers that are random: PonderNet's sampled halting, and its deterministic criterion."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hf_thinkingvit import AdaptiveImageClassificationPipeline
from hf_thinkingvit.evaluation.stages import measure_stages
from hf_thinkingvit.image_processing import evaluation_image_processor
from hf_thinkingvit.inference import AdaptiveEngine
from hf_thinkingvit.models.staged_loop import run_stages, step_stage
from tests.models.test_modeling_early_exit_vit import lively_exits, lively_method, reference_scores
from tests.utils import random_images


class TestSampledHalting:
    @torch.no_grad()
    def test_frequencies_are_the_probabilities(self):
        """Of one image, drawn often; within four standard deviations."""
        model, draws = lively_method("pondernet"), 4000
        image = random_images(1, seed=7)
        scores = reference_scores(model, image)[0]
        probabilities = scores * torch.cat([torch.ones(1), (1 - scores[:-1]).cumprod(0)])
        torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
        generator = torch.Generator().manual_seed(0)
        stages = model(image.expand(draws, -1, -1, -1), generator=generator).exit_stage
        shares = torch.bincount(stages, minlength=4) / draws
        assert ((shares - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / draws).sqrt()).all()
        assert probabilities.min() > 0.03

    @torch.no_grad()
    def test_a_generator_makes_it_reproducible(self):
        model, images = lively_method("pondernet"), random_images(24)
        runs = [model(images, generator=torch.Generator().manual_seed(seed)).exit_stage for seed in (0, 0, 1)]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    def test_a_generator_is_for_a_criterion_that_draws(self):
        for call in (lively_exits(), lambda images, generator: AdaptiveEngine(lively_exits(), generator=generator)):
            with pytest.raises(ValueError, match="`generator` is for an `exit_criterion` that draws .*'topk_entropy'"):
                call(random_images(), generator=torch.Generator())

    @torch.no_grad()
    def test_draws_do_not_depend_on_the_last_bits_of_pixels(self):
        """Nor on the dtype; images whose halting scores change with it could exit elsewhere, but none is so near."""
        model, images = lively_method("pondernet"), random_images(24)
        exits = model(images, generator=torch.Generator().manual_seed(0)).exit_stage
        moved = model(images * (1 + 1e-6), generator=torch.Generator().manual_seed(0)).exit_stage
        assert torch.equal(exits, moved)
        rounded = model.bfloat16()(images.bfloat16(), generator=torch.Generator().manual_seed(0)).exit_stage
        assert (exits == rounded).float().mean() > 0.9

    @torch.no_grad()
    def test_without_a_generator_the_global_one_draws(self):
        model, images = lively_method("pondernet"), random_images(24)
        runs = []
        for seed in (0, 0, None):
            if seed is not None:
                torch.manual_seed(seed)
            runs.append(model(images).exit_stage)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])

    def test_an_engines_generator_goes_on_and_starts_again(self):
        model, images = lively_method("pondernet"), random_images(24)
        generator = torch.Generator().manual_seed(3)

        def exits(batch_size):
            return [
                result.exit_stage
                for result in AdaptiveEngine(model, batch_size=batch_size, generator=generator)(images)
            ]

        first, second = exits(5), exits(5)
        generator.manual_seed(3)
        assert exits(24) == first != second

    def test_a_pipeline_takes_it(self):
        model = lively_method("pondernet")
        classifier = AdaptiveImageClassificationPipeline(model, image_processor=evaluation_image_processor(32))
        pixels = torch.randint(0, 256, (12, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
        images = [Image.fromarray(each) for each in pixels]
        stream, again, alone = (
            [result[0]["exit_stage"] for result in classify(torch.Generator().manual_seed(5))]
            for classify in (
                lambda generator: classifier(images, generator=generator, batch_size=5),
                lambda generator: classifier(images, generator=generator),
                lambda generator: [classifier(image, generator=generator) for image in images],
            )
        )
        assert stream == again == alone and len(set(stream)) > 1

    def test_q_exit_is_the_median_of_the_sampled_exits(self):
        """Balagansky and Gavrilov's deterministic criterion: the first stage by which F is above τ."""
        model, images = lively_method("pondernet", exit_criterion="q_exit"), random_images(24)
        assert model.config.threshold == 0.5
        with torch.no_grad():
            halted = 1 - (1 - reference_scores(model, images)).cumprod(dim=1)
            assert torch.equal(model(images).exit_stage, (halted > 0.5).int().argmax(dim=1))
            assert torch.equal(model(images).exit_stage, model(images).exit_stage)

    def test_one_measurement_repeats_and_does_not_depend_on_batches(self):
        model, images = lively_method("pondernet"), random_images(12)
        scores = [
            measure_stages(
                model, [{"pixel_values": part} for part in images.split(size)], lambda *_: {}, progress=False
            ).scores
            for size in (5, 5, 12)
        ]
        assert torch.equal(scores[0], scores[1])
        torch.testing.assert_close(scores[1], scores[2])


def test_processes_that_share_images_draw_what_one_would():
    """Each reads every second batch, and stands here for an `Accelerator` that gathers nothing."""
    model, images = lively_method("pondernet"), random_images(12)

    def scores(batches, accelerator=None):
        return measure_stages(
            model, [{"pixel_values": batch} for batch in batches], lambda *_: {}, accelerator, progress=False
        ).scores

    batches = images.split(3)
    shares = []
    for index in (0, 1):
        process = SimpleNamespace(num_processes=2, process_index=index, is_main_process=False)
        process.gather_for_metrics = lambda rows: rows
        shares.append(scores(batches[index::2], process).split(3))
    together = [batch for pair in zip(*shares) for batch in pair]
    torch.testing.assert_close(torch.cat(together), scores(batches))


def test_a_drawn_number_decides(monkeypatch):
    """A number above any halting probability keeps an image from halting; 0 lets it halt at once."""
    model, images = lively_method("pondernet"), random_images(4)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.tensor([0.0, 0.9999999, 0.0, 0.9999999]))
    with torch.no_grad():
        run = run_stages(model, model.exit_rule(), range(4), images)
    assert run.exit_stage.tolist() == [0, 3, 0, 3]


def test_a_stage_without_the_drawn_number_says_what_to_do():
    model = lively_method("pondernet")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="let the first stage start with the state that `first_state`"),
    ):
        step_stage(model, model.exit_rule(), range(4), 0, {"pixel_values": random_images()})
