import copy
import pickle
import shutil
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_thinkingvit.inference import AdaptiveEngine
from tests.utils import lively_model, lively_swin, middle_threshold, random_images


# Two stages of one layer, so that compilation is fast.
VIT = {"thinking_stages": [1, 2], "hidden_size": 16, "num_hidden_layers": 1, "patch_size": 16}
SWIN = {"head_rounds": [[1], [2]], "num_heads": [2], "depths": [1]}
FAMILIES = pytest.mark.parametrize(
    "make", [lambda: lively_model(**VIT), lambda: lively_swin(**SWIN)], ids=["vit", "swin"]
)


def tiny_model():
    return lively_model(**VIT)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def logits_of(model, images, **options) -> torch.Tensor:
    """Logits of the first stage, which runs two programs."""
    return model(images, max_stages=1, **options).logits


def eager_logits(model, images) -> torch.Tensor:
    """The model's logits without compiled programs: with gradients, nothing is compiled or cached."""
    return model(images, max_stages=1).logits.detach()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
@torch.no_grad()
def test_answers_are_the_eager_ones():
    """With the default compiler, inductor."""
    model, images = lively_swin(**SWIN), random_images(3)
    threshold = middle_threshold(model, images)
    expected = model(images, threshold=threshold)
    model.compile_stages([4])
    outputs = model(images, threshold=threshold)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=0)
    assert torch.equal(outputs.exit_stage, expected.exit_stage)


@FAMILIES
@torch.no_grad()
def test_nothing_compiles_again_in_steady_state(make):
    model, images = make(), random_images(20)
    counts = (1, 2, 3, 5, 7, 8, 9, 20)
    expected = [model(images[:count], threshold=0.9) for count in counts]
    model.compile_stages([2, 8], backend="eager")
    for count in (1, 8):
        model(images[:count], threshold=0.0)
    warmed_up = compilations()
    # `begin`, `run_stage` of two stages and `recycle`, each for two batch sizes.
    assert warmed_up == 8
    for count, one in zip(counts, expected):
        outputs = model(images[:count], threshold=0.9)
        torch.testing.assert_close(outputs.logits, one.logits, atol=1e-5, rtol=0)
        assert torch.equal(outputs.exit_stage, one.exit_stage)
    assert compilations() == warmed_up


@torch.no_grad()
def test_batches_are_filled_up_to_powers_of_two_by_default():
    model, rows = tiny_model(), []
    model.thinkingvit.layernorm.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model.compile_stages()
    with torch.compiler.set_stance("force_eager"):  # runs the programs without compiling them
        for count in (1, 2, 3, 7, 9, 31, 33, 64, 67):
            assert logits_of(model, random_images(count)).shape == (count, 12)
    assert rows == [1, 2, 4, 8, 16, 32, 64, 64, 64, 4]


@pytest.mark.parametrize("pixel_values", [None, torch.tensor(1.0), torch.zeros(2, 5, 5)])
@torch.no_grad()
def test_what_is_no_batch_fails_as_before(pixel_values):
    model, said = tiny_model(), []
    for batch_sizes in (None, [2]):
        model.compile_stages(batch_sizes)
        with pytest.raises(ValueError, match="`pixel_values`") as error:
            model(pixel_values)
        said.append(str(error.value))
    assert said[0] == said[1] and compilations() == 0


@torch.no_grad()
def test_the_engine_runs_compiled_stages():
    model, images = tiny_model(), random_images(20)
    threshold = middle_threshold(model, images)
    expected = model(images, threshold=threshold)
    model.compile_stages([8], backend="eager")
    results = list(AdaptiveEngine(model, batch_size=8, threshold=threshold)(images))
    torch.testing.assert_close(torch.stack([r.logits for r in results]), expected.logits, atol=1e-5, rtol=0)
    assert compilations() == 4


def test_what_is_not_compiled_runs_as_before():
    model, images = tiny_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    model.eval()
    assert model(images).logits.requires_grad
    with torch.no_grad():
        assert len(model(images, output_hidden_states=True, threshold=0.0).hidden_states) == 3
        model.config.output_hidden_states = True
        assert len(model(images, threshold=0.0).hidden_states) == 3
        model.config.output_hidden_states = False
        with pytest.raises(TypeError):
            model.run_stage(0, model.thinkingvit.begin(images), False, None, 1)
        assert compilations() == 0
        model.compile_stages(None)
        model(images)
    assert compilations() == 0
    assert model.__dict__.keys() == tiny_model().__dict__.keys() | {"_output_capturing_hooks_installed"}


@torch.no_grad()
def test_recording_once_does_not_end_it():
    model, images = tiny_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    model(images, output_hidden_states=True)
    expected = eager_logits(model, images)
    torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=0)
    assert compilations() == 2 and not counters["graph_break"]


@torch.no_grad()
def test_other_image_sizes_have_programs_of_their_own():
    model, images = tiny_model(), random_images(2, 48)
    expected = logits_of(model, images, interpolate_pos_encoding=True)
    model.compile_stages([2], backend="eager")
    for _ in range(2):
        logits_of(model, random_images(2))
        logits = logits_of(model, images, interpolate_pos_encoding=True)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert compilations() == 4


class TestCopies:
    """A copy uses its own weights, and is not compiled."""

    @pytest.fixture
    def model(self):
        model = tiny_model()
        model.compile_stages([2], backend="eager")
        logits_of(model, random_images(2))
        assert compilations() == 2
        return model

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
        ids=["deepcopy", "copy", "pickle"],
    )
    def test_has_its_own_weights(self, model, duplicate):
        images, before = random_images(2), logits_of(model, random_images(2))
        twin = duplicate(model)
        assert twin.__dict__.keys() == tiny_model().__dict__.keys()
        torch.testing.assert_close(logits_of(twin, images), before, atol=1e-5, rtol=0)
        assert compilations() == 2
        twin.classifier = copy.deepcopy(model.classifier)
        nn.init.normal_(twin.classifier.weight)
        expected = eager_logits(twin, images)
        assert not torch.allclose(expected, before, atol=1e-2)
        for _ in range(2):
            torch.testing.assert_close(logits_of(twin, images), expected, atol=1e-5, rtol=0)
            twin.compile_stages([2], backend="eager")
        torch.testing.assert_close(logits_of(model, images), eager_logits(model, images), atol=1e-5, rtol=0)

    def test_replicas_of_data_parallel(self, model):
        """Built as by `torch.nn.parallel.replicate`, with weights of their own."""
        images, modules = random_images(2), list(model.modules())
        replicas = {module: module._replicate_for_data_parallel() for module in modules}
        for module, replica in replicas.items():
            for name, child in module.named_children():
                setattr(replica, name, replicas[child])
            for name, parameter in module.named_parameters(recurse=False):
                setattr(replica, name, 2 * parameter.detach())
        replica = replicas[model]
        doubled = tiny_model()
        for parameter in doubled.parameters():
            parameter.data.mul_(2)
        torch.testing.assert_close(logits_of(replica, images), eager_logits(doubled, images), atol=1e-5, rtol=0)
        assert compilations() == 2

    def test_saved_and_loaded(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        torch.save(model, tmp_path / "model.pt")
        expected = logits_of(model, random_images(2))
        for loaded in (
            type(model).from_pretrained(tmp_path / "model").eval(),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ):
            torch.testing.assert_close(logits_of(loaded, random_images(2)), expected, atol=1e-5, rtol=0)

    def test_compiled_as_a_whole(self, model):
        images = random_images(2)
        whole = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits_of(whole, images), eager_logits(model, images), atol=1e-5, rtol=0)
        model.compile(backend="eager")
        twin = copy.deepcopy(model)
        twin.classifier.weight.data.mul_(2)
        torch.testing.assert_close(logits_of(twin, images), eager_logits(twin, images), atol=1e-5, rtol=0)


class Doubled(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, *args):
        return 2 * self.linear(*args)


def replace_parameter(model):
    weight = model.thinkingvit.layers[0].mlp.fc1.weight
    model.thinkingvit.layers[0].mlp.fc1.weight = nn.Parameter(torch.randn_like(weight))


def replace_module(model):
    model.thinkingvit.layers[0].mlp.fc1 = Doubled(model.thinkingvit.layers[0].mlp.fc1)


def replace_activation(model):
    model.thinkingvit.layers[0].mlp.activation_fn = nn.ReLU()


def load_weights(model):
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})


def change_data(model):
    model.classifier.weight.data = torch.randn_like(model.classifier.weight)


def add_hook(model):
    model.thinkingvit.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def scale_attention(model):
    model.thinkingvit.layers[0].attention.scaling = 3.0


def override_step(model):
    run_stage = type(model).run_stage

    class Doubling(type(model)):
        def run_stage(self, *args, **kwargs):
            state = run_stage(self, *args, **kwargs)
            return {**state, "tokens": 2 * state["tokens"]}

    model.__class__ = Doubling


CHANGES = [
    replace_parameter,
    replace_module,
    replace_activation,
    load_weights,
    change_data,
    add_hook,
    scale_attention,
    override_step,
]


def test_changes_after_compiling_are_seen():
    model, images = tiny_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    for change in CHANGES:  # in one model, because each change recompiles only what it affects
        before = logits_of(model, images)
        change(model)
        expected = eager_logits(model, images)
        assert not torch.allclose(before, expected, atol=1e-3), change
        torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=1e-5, msg=change.__name__)


def test_another_dtype_or_backend_after_compiling():
    model, images = tiny_model(), random_images(2)
    model.compile_stages([2], backend="eager")
    expected = logits_of(model, images)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=0)
    assert logits_of(model.double(), images).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits_of(model.float(), images).dtype == torch.bfloat16
    with torch.inference_mode():
        model(images, max_stages=1)
    torch.testing.assert_close(logits_of(model, images), expected, atol=1e-5, rtol=0)


def test_threads():
    model, images = tiny_model(), random_images(8)
    expected = eager_logits(model, images)
    model.compile_stages([1, 4], backend="eager")
    answers = {}

    def answer(start):
        answers[start] = torch.cat([logits_of(model, images[start : start + 1]) for _ in range(2)])

    threads = [threading.Thread(target=answer, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start in range(8):
        torch.testing.assert_close(answers[start], expected[start].expand(2, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_sizes", [[], [0], [1.5], "8", 8])
def test_refuses(batch_sizes):
    with pytest.raises(ValueError, match="`batch_sizes`"):
        tiny_model().compile_stages(batch_sizes)
