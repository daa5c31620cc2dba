"""Transformers' own model tests, on every model class."""

import inspect
import os
import unittest
import unittest.mock

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_thinkingvit import (
    AViTConfig,
    AViTForImageClassification,
    AViTModel,
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
    EarlyExitViTModel,
    ElasticViTConfig,
    ElasticViTForImageClassification,
    ElasticViTModel,
    ThinkingSwinConfig,
    ThinkingSwinForImageClassification,
    ThinkingSwinModel,
    ThinkingViTConfig,
    ThinkingViTForImageClassification,
    ThinkingViTForSemanticSegmentation,
    ThinkingViTModel,
)
from hf_thinkingvit.models.token_packing import PackedTokens
from tests.transformers_common import load_model_tester_mixin


ModelTesterMixin = load_model_tester_mixin()
if ModelTesterMixin is None:
    message = (
        "Transformers' tests are not here: run `python tests/fetch_transformers_tests.py` (needs the package index)"
    )
    if os.environ.get("CI"):
        raise FileNotFoundError(message)
    pytest.skip(message, allow_module_level=True)


def of_padding(name: str) -> bool:
    """
    Whether a common test is another one over again for a model that takes no attention mask: which tokens of a text are
    padding, and whether a mask says so, is never handed to it.
    """
    return name.startswith("test_eager_matches_sdpa_inference_") and ("_pad_right" in name or "_no_attn_mask" in name)


class ThinkingViTModelTester:
    """Small configuration and inputs, under the attribute names that the common tests read."""

    def __init__(self, parent, thinking_stages=(2, 4)):
        self.parent = parent
        self.batch_size = 7
        self.image_size = 30
        self.patch_size = 10
        self.num_labels = 10
        self.thinking_stages = list(thinking_stages)
        self.layers_per_stage = 2
        # The tests expect the sizes of the first recorded layer, and the number of layers recorded over all stages.
        self.num_hidden_layers = self.layers_per_stage * len(thinking_stages)
        self.num_attention_heads = thinking_stages[0]
        self.hidden_size = 8 * thinking_stages[0]
        self.seq_length = 10
        self.encoder_seq_length = self.seq_length
        self.is_training = True

    def get_config(self):
        return self.sized(
            ThinkingViTConfig,
            thinking_stages=self.thinking_stages,
            threshold=0.0,  # every stage runs, because the tests compare batches and rows layer by layer
            initializer_range=0.02,
        )

    def sized(self, config_class, **fields):
        sizes = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64, "num_labels": self.num_labels}
        images = {"image_size": self.image_size, "patch_size": self.patch_size}
        return config_class(num_hidden_layers=self.layers_per_stage, **sizes, **images, **fields)

    def prepare_config_and_inputs_for_common(self):
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixel_values}


class ThinkingViTModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ThinkingViTModel, ThinkingViTForImageClassification)
    test_resize_embeddings = False

    model_tester_class = ThinkingViTModelTester

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        # The tests recognise models without heads, which have no loss, by their names in this mapping.
        bare_model, _ = self.all_model_classes
        names = unittest.mock.patch.dict(MODEL_MAPPING_NAMES, {bare_model.config_class.model_type: bare_model.__name__})
        names.start()
        self.addCleanup(names.stop)

    def test_takes_no_attention_mask(self):
        """Or the tests of padding would apply."""
        for model_class in self.all_model_classes:
            assert "attention_mask" not in inspect.signature(model_class.forward).parameters

    @unittest.skip("counts the layer outputs of all stages here: two stages of two layers, which is small")
    def test_num_layers_is_small(self):
        pass

    def test_model_get_set_embeddings(self):
        """As in Transformers' tests of ViT: the common test expects an embedding table, not a convolution."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)


for test in filter(of_padding, dir(ModelTesterMixin)):
    setattr(ThinkingViTModelTest, test, None)


class PlainViTModelTest(ThinkingViTModelTest):
    """A ThinkingViT with one stage, which is a plain ViT."""

    def setUp(self):
        super().setUp()
        self.model_tester = ThinkingViTModelTester(self, thinking_stages=(4,))


class LinearSegmenterTester(ThinkingViTModelTester):
    """The same with a decoder, which reads all tokens."""

    decoder_fields = {"decoder_type": "linear"}

    def sized(self, config_class, **fields):
        return super().sized(config_class, **fields, **self.decoder_fields)


class MaskTransformerTester(LinearSegmenterTester):
    decoder_fields = {
        "decoder_type": "mask_transformer",
        "decoder_hidden_size": 24,
        "decoder_num_attention_heads": 3,
        "decoder_num_hidden_layers": 1,
    }


class LinearSegmenterTest(ThinkingViTModelTest):
    all_model_classes = (ThinkingViTModel, ThinkingViTForSemanticSegmentation)
    model_tester_class = LinearSegmenterTester


class MaskTransformerTest(LinearSegmenterTest):
    model_tester_class = MaskTransformerTester


class PruningModelTester(ThinkingViTModelTester):
    """One stage that removes patches before its last layer: the first recorded layer has all of them."""

    def __init__(self, parent):
        super().__init__(parent, thinking_stages=(4,))

    def get_config(self):
        return self.sized(
            ThinkingViTConfig, thinking_stages=[4], pruning_layers=[1], pruning_keep_rate=0.5, threshold=0.0
        )


class PruningModelTest(ThinkingViTModelTest):
    model_tester_class = PruningModelTester


class ThinkingSwinModelTester(ThinkingViTModelTester):
    """A ThinkingSwin: two rounds over two layers, 4 × 4 patches and then 2 × 2, in windows of 4 × 4."""

    def __init__(self, parent, head_rounds=((1, 2), (2, 4))):
        super().__init__(parent)
        self.image_size, self.patch_size = 16, 4
        self.head_rounds = [list(heads) for heads in head_rounds]
        self.depths = [2, 1]
        # The tests expect one entry per block in attentions, and one per layer in hidden states.
        self.num_hidden_layers = sum(self.depths) * len(head_rounds)
        self.expected_num_hidden_layers = len(self.depths) * len(head_rounds) + 1
        self.num_attention_heads = head_rounds[0][0]
        self.seq_length = self.encoder_seq_length = 16
        self.hidden_size = 8 * head_rounds[0][0]

    def get_config(self):
        return ThinkingSwinConfig(
            head_rounds=self.head_rounds,
            num_heads=[2, 4],
            depths=self.depths,
            embed_dim=16,
            window_size=4,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_labels=self.num_labels,
            threshold=0.0,
        )


class ThinkingSwinModelTest(ThinkingViTModelTest):
    all_model_classes = (ThinkingSwinModel, ThinkingSwinForImageClassification)
    model_tester_class = ThinkingSwinModelTester


class EarlyExitViTModelTester(ThinkingViTModelTester):
    """The same for exits by layer, each with a transformer layer of its own."""

    def __init__(self, parent):
        super().__init__(parent, thinking_stages=(4,))

    def get_config(self):
        return self.sized(EarlyExitViTConfig, exit_head="transformer_layer", threshold=0.0)


class EarlyExitViTModelTest(ThinkingViTModelTest):
    all_model_classes = (EarlyExitViTModel, EarlyExitViTForImageClassification)
    model_tester_class = EarlyExitViTModelTester

    @unittest.skip("expects one classifier that depends on the number of labels, and exits have their own")
    def test_can_load_ignoring_mismatched_shapes(self):
        pass


class ActModelTester(EarlyExitViTModelTester):
    """The same for learned halting, which never ends early at τ = 1."""

    def get_config(self):
        return self.sized(EarlyExitViTConfig, halting="act", exit_head="shared", threshold=1.0)


class ActModelTest(ThinkingViTModelTest):
    all_model_classes = (EarlyExitViTModel, EarlyExitViTForImageClassification)
    model_tester_class = ActModelTester

    @unittest.skip("the loss of learned halting is of single-label classification")
    def test_problem_types(self):
        pass


class ElasticViTModelTester(EarlyExitViTModelTester):
    """The same for an elastic ViT, which runs as a whole."""

    def get_config(self):
        return self.sized(ElasticViTConfig)


class ElasticViTModelTest(ThinkingViTModelTest):
    all_model_classes = (ElasticViTModel, ElasticViTForImageClassification)
    model_tester_class = ElasticViTModelTester


class AViTModelTester(ThinkingViTModelTester):
    """
    A distilled A-ViT. About half of the tokens halt after the first layer: those whose gate channel is above 0. Their
    number differs between images.
    """

    def __init__(self, parent):
        super().__init__(parent, thinking_stages=(4,))
        self.seq_length = self.encoder_seq_length = 11

    def get_config(self):
        return self.sized(
            AViTConfig,
            target_depth=1,
            use_distillation_token=True,
            gate_scale=1000.0,
            gate_center=0.0,
            halting_epsilon=0.5,
            initializer_range=0.2,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixel_values}


class AViTModelTest(ThinkingViTModelTest):
    all_model_classes = (AViTModel, AViTForImageClassification)
    model_tester_class = AViTModelTester
    # Other tests use the dense computation (training, recorded outputs) or never call the classifier.
    sparse_tests = (
        "test_determinism",
        "test_feed_forward_chunking",
        "test_model_outputs_equivalence",
        "test_save_load",
    )

    def setUp(self):
        super().setUp()
        self.tokens_that_go_on = []  # share of remaining tokens, each time that tokens leave
        select = PackedTokens.select

        def count(packed: PackedTokens, rows: torch.Tensor) -> PackedTokens:
            self.tokens_that_go_on.append(len(rows) / len(packed.position))
            return select(packed, rows)

        counting = unittest.mock.patch.object(PackedTokens, "select", count)
        counting.start()
        self.addCleanup(counting.stop)

    def tearDown(self):
        if self._testMethodName in self.sparse_tests:
            assert self.tokens_that_go_on
            assert all(0.1 < share < 0.9 for share in self.tokens_that_go_on)
        super().tearDown()
