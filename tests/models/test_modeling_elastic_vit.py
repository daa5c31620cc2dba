import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_thinkingvit import ElasticViTConfig, ElasticViTForImageClassification, SubNetwork
from hf_thinkingvit.evaluation import stage_macs, sub_network_macs
from hf_thinkingvit.inference import AdaptiveEngine
from tests.models.test_weights_from_vit import trained_vit
from tests.utils import counted_flops, lively, random_images


SIZES = {
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 12,
}
METHODS = ("hydravit", "matformer", "dynabert", "sortednet")


def lively_elastic(method: str = "matformer", **fields) -> ElasticViTForImageClassification:
    return lively(ElasticViTForImageClassification, getattr(ElasticViTConfig, method)(**{**SIZES, **fields}))


def reference(model, pixel_values, network: SubNetwork):
    """Logits of a sub-network: explicit slices of the weights, and functions of torch."""
    weights = dict(model.named_parameters())
    heads, width, inner = (
        network.num_attention_heads,
        network.hidden_size,
        network.num_attention_heads * network.head_dim,
    )

    def linear(x, name, rows):
        return x @ weights[name + ".weight"][:rows, : x.shape[-1]].T + weights[name + ".bias"][:rows]

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[name + ".weight"][:width], weights[name + ".bias"][:width], 1e-6)

    entry = "elastic_vit.embeddings."
    kernel = weights[entry + "patch_embeddings.weight"][:width], weights[entry + "patch_embeddings.bias"][:width]
    patches = F.conv2d(pixel_values, *kernel, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([weights[entry + "cls_token"][..., :width].expand(len(patches), -1, -1), patches], 1)
    x = x + weights[entry + "position_embeddings"][..., :width]
    for layer in range(4) if network.layers is None else network.layers:
        name, mlp = f"elastic_vit.layers.{layer}.", network.intermediate_size
        h = norm(x, name + "layernorm_before")
        q, k, v = (linear(h, f"{name}attention.{p}_proj", inner).unflatten(-1, (heads, -1)) for p in "qkv")
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / network.head_dim**0.5
        x = x + linear(
            torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(2), name + "attention.o_proj", width
        )
        h = linear(norm(x, name + "layernorm_after"), name + "mlp.fc1", mlp if isinstance(mlp, int) else mlp[layer])
        x = x + linear(F.gelu(h), name + "mlp.fc2", width)
    return linear(norm(x, "elastic_vit.layernorm")[:, 0], "classifier", 12)


@pytest.mark.parametrize("method", METHODS)
class TestSubNetworks:
    @torch.no_grad()
    def test_equal_a_plain_vit_with_sliced_weights(self, method):
        model, pixel_values = lively_elastic(method), random_images()
        for number, network in enumerate(model.config.networks):
            expected = reference(model, pixel_values, network)
            torch.testing.assert_close(model(pixel_values, sub_network=number).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_extracted(self, method):
        model, pixel_values = lively_elastic(method), random_images()
        for number, network in enumerate(model.config.networks):
            if network.attention_size != network.hidden_size:
                with pytest.raises(ValueError, match="A plain ViT has `hidden_size` channels in its heads"):
                    model.extract_sub_network(number)
                continue
            vit = model.extract_sub_network(number)
            assert type(vit) is ViTForImageClassification and not vit.training
            expected = model(pixel_values, sub_network=number).logits
            torch.testing.assert_close(vit(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_cost_what_the_forward_computes(self, method):
        model, pixel_values = lively_elastic(method), random_images(1)
        for number, macs in enumerate(sub_network_macs(model.config)):
            spent = counted_flops(lambda number=number: model(pixel_values, sub_network=number))
            assert spent == 2 * macs

    @torch.no_grad()
    def test_the_whole_is_the_source(self, method):
        vit, pixel_values = trained_vit(num_hidden_layers=4).eval(), random_images()
        model = ElasticViTForImageClassification.from_vit(vit, method)
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits)

    def test_gradients_of_those_that_are_asked_for(self, method):
        model, pixel_values, labels = lively_elastic(method).train(), random_images(), torch.arange(6)
        networks = model.config.networks
        expected = (
            sum(F.cross_entropy(reference(model, pixel_values, networks[number]), labels) for number in (0, 2)) / 2
        )
        gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
        loss = model(pixel_values, labels, sub_network=[0, 2]).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for (name, parameter), gradient in zip(model.named_parameters(), gradients):
            if gradient is None:
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)

    def test_saved_and_loaded(self, method, tmp_path):
        model, pixel_values = lively_elastic(method), random_images()
        model.save_pretrained(tmp_path)
        loaded = ElasticViTForImageClassification.from_pretrained(tmp_path, default_sub_network=1)
        assert loaded.config.networks == model.config.networks
        with torch.no_grad():
            expected = model(pixel_values, sub_network=1).logits
            torch.testing.assert_close(loaded(pixel_values).logits, expected)


class TestMixedWidths:
    @torch.no_grad()
    def test_a_width_per_layer_at_call_time(self):
        model, pixel_values = lively_elastic(), random_images()
        network = SubNetwork(4, 32, (16, 128, 32, 7))
        expected = reference(model, pixel_values, network)
        outputs = model(pixel_values, intermediate_size=[16, 128, 32, 7])
        torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-5)
        bare = model.base_model(pixel_values, intermediate_size=[16, 128, 32, 7]).last_hidden_state
        torch.testing.assert_close(model.classifier(bare[:, 0]), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("widths, message", [([16] * 3, "4 layers, got 3"), (129, "uses 129 MLP channels")])
    def test_widths_that_do_not_fit(self, widths, message):
        with pytest.raises(ValueError, match=message):
            lively_elastic()(random_images(), intermediate_size=widths)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "fields", [{"intermediate_size": [24] * 4}, {"intermediate_size": [9, 24, 8, 24], "layers": [1, 3]}]
    )
    def test_one_width_in_all_layers_that_run_is_extracted(self, fields):
        config = ElasticViTConfig(
            sub_networks=[{"num_attention_heads": 4, "hidden_size": 32, **fields}], **SIZES, intermediate_size=48
        )
        model, pixel_values = lively(ElasticViTForImageClassification, config), random_images()
        vit = model.extract_sub_network()
        assert vit.config.intermediate_size == 24
        torch.testing.assert_close(vit(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-5)

    def test_no_plain_vit_has_them(self):
        network = {"num_attention_heads": 4, "hidden_size": 32, "intermediate_size": [8, 8, 8, 9]}
        model = ElasticViTForImageClassification(ElasticViTConfig(sub_networks=[network], **SIZES))
        with pytest.raises(ValueError, match="one MLP width"):
            model.extract_sub_network()


class TestSeparateClassifiers:
    @torch.no_grad()
    def test_each_sub_network_has_its_own(self, tmp_path):
        model, pixel_values = lively_elastic("hydravit", separate_classifiers=True), random_images()
        assert [each.in_features for each in model.classifier] == [8, 16, 24, 32]
        model.save_pretrained(tmp_path)
        loaded = ElasticViTForImageClassification.from_pretrained(tmp_path, default_sub_network=1)
        shared = lively_elastic("hydravit")
        shared.elastic_vit.load_state_dict(model.elastic_vit.state_dict())
        for number, classifier in enumerate(model.classifier):
            shared.classifier.weight[:, : classifier.in_features] = classifier.weight
            shared.classifier.bias.copy_(classifier.bias)
            expected = reference(shared, pixel_values, model.config.networks[number])
            logits = model(pixel_values, sub_network=[number]).sub_network_logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loaded(pixel_values, sub_network=number).logits, logits)
            vit = model.extract_sub_network(number)
            torch.testing.assert_close(vit(pixel_values).logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values, sub_network=1).logits)
        torch.testing.assert_close(loaded.extract_sub_network().classifier.weight, model.classifier[1].weight)

    def test_only_those_that_ran_learn(self):
        model = lively_elastic(separate_classifiers=True).train()
        model(random_images(), torch.arange(6), sub_network=[0, 2]).loss.backward()
        assert [each.weight.grad is not None for each in model.classifier] == [True, False, True, False]

    @torch.no_grad()
    def test_start_as_columns_of_the_source(self):
        vit, pixel_values, labels = trained_vit().half().eval(), random_images(), torch.arange(3).repeat(2)
        model = ElasticViTForImageClassification.from_vit(vit, "sortednet", separate_classifiers=True)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
        assert model.config.separate_classifiers and not any(module.training for module in model.modules())
        vit, sizes = vit.float(), {"reorder": "importance", "pixel_values": pixel_values, "labels": labels}
        shared = ElasticViTForImageClassification.from_vit(vit, "sortednet", **sizes)
        model = ElasticViTForImageClassification.from_vit(vit, "sortednet", separate_classifiers=True, **sizes)
        for number in range(len(model.config.networks)):
            expected = shared(pixel_values, sub_network=number).logits
            torch.testing.assert_close(model(pixel_values, sub_network=number).logits, expected)


class TestWiderThanTheSource:
    @torch.no_grad()
    def test_the_leading_heads_are_the_source(self):
        vit, pixel_values = trained_vit(num_attention_heads=2).eval(), random_images()
        model = ElasticViTForImageClassification.from_vit(vit, "hydravit", num_attention_heads=6, heads=[2, 4, 6])
        assert model.config.hidden_size == 3 * vit.config.hidden_size
        assert model.config.intermediate_size == 3 * vit.config.intermediate_size
        torch.testing.assert_close(model(pixel_values, sub_network=0).logits, vit(pixel_values).logits)
        assert not torch.allclose(model(pixel_values).logits, vit(pixel_values).logits)

    def test_what_cannot_start_so(self):
        vit = trained_vit(num_attention_heads=2)
        from_vit, images, labels = ElasticViTForImageClassification.from_vit, random_images(), torch.arange(6) % 3
        with pytest.raises(ValueError, match="None of `sub_networks` is the network of the source's size"):
            from_vit(vit, "matformer", num_attention_heads=4)
        with pytest.raises(ValueError, match="`num_attention_heads` must be an integer of at least 2"):
            from_vit(vit, "hydravit", num_attention_heads=1)
        with pytest.raises(ValueError, match="not all trained"):
            from_vit(vit, "hydravit", "importance", images, labels, num_attention_heads=4, heads=[2, 4])


class TestConfiguration:
    def test_published_sub_networks(self):
        def sizes(method, **fields):
            networks = getattr(ElasticViTConfig, method)(**fields).networks
            return [(n.num_attention_heads, n.hidden_size, n.intermediate_size) for n in networks]

        assert sizes("hydravit")[0] == (3, 192, 768) and sizes("hydravit")[-1] == (12, 768, 3072)
        assert sizes("hydravit", heads=[3, 6], num_attention_heads=6) == [(3, 192, 768), (6, 384, 1536)]
        assert [size[2] for size in sizes("matformer")] == [384, 768, 1536, 3072]
        assert sizes("sortednet")[:2] == [(12, 192, 768), (12, 384, 1536)]
        assert sizes("dynabert")[:2] == [(3, 768, 768), (6, 768, 1536)]
        layers = [network.layers for network in ElasticViTConfig.dynabert().networks]
        assert layers[0] == (0, 2, 4, 6, 8, 10) and layers[4] == (0, 1, 2, 4, 5, 6, 8, 9, 10)
        assert layers[8] == tuple(range(12))
        widths = ElasticViTConfig.dynabert(depths=[1.0])
        assert widths.networks == ElasticViTConfig.dynabert().networks[8:] and widths.whole_sub_network == 3
        with pytest.raises(ValueError, match="`depths`"):
            ElasticViTConfig.dynabert(depths=[0])

    @pytest.mark.parametrize("method", METHODS)
    def test_presets_take_any_field(self, method):
        """Also an MLP that the heads cannot share equally; but the sub-networks are the preset's to choose."""
        preset = getattr(ElasticViTConfig, method)
        config = preset(**{**SIZES, "num_attention_heads": 3, "hidden_size": 48}, intermediate_size=100)
        widths = {"matformer": [12, 25, 50, 100], "sortednet": [25, 50, 75, 100]}.get(method, [33, 66, 100])
        assert [network.intermediate_size for network in config.networks[-len(widths) :]] == widths
        assert config.whole_sub_network == config.default_sub_network == len(config.networks) - 1
        with pytest.raises(ValueError, match=f"`{method}` chooses the `sub_networks`: leave them out"):
            preset(sub_networks=config.sub_networks)

    @pytest.mark.parametrize(
        "heads, widths", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (6, [2, 3, 4, 6])]
    )
    def test_few_heads_and_layers_give_no_sub_network_twice(self, heads, widths):
        networks = ElasticViTConfig.dynabert(num_attention_heads=heads, depths=[1.0]).networks
        assert [network.num_attention_heads for network in networks] == widths
        networks = ElasticViTConfig.dynabert(num_attention_heads=heads, num_hidden_layers=2).networks
        assert len(set(networks)) == len(networks) == 2 * len(widths)
        for method in METHODS:
            tiny = getattr(ElasticViTConfig, method)(num_attention_heads=1, hidden_size=2, num_hidden_layers=1)
            assert len(set(tiny.networks)) == len(tiny.networks)

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"sub_networks": []}, "non-empty"),
            (
                {"sub_networks": [{"num_attention_heads": 5, "hidden_size": 40, "intermediate_size": 8}]},
                r"\[0\]` uses 40",
            ),
            ({"default_sub_network": 1}, "`default_sub_network` must be from 0 to 0"),
            ({"sub_network_loss_weights": [1.0, 1.0]}, "`sub_network_loss_weights` must be a list of 1 numbers"),
            ({"sub_network_loss_weights": [0.0]}, "`sub_network_loss_weights` must be finite with a sum above 0"),
            ({"separate_classifiers": 1}, "`separate_classifiers` must be true or false"),
        ],
    )
    def test_values_that_cannot_work(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ElasticViTConfig(**{**SIZES, **fields})

    @pytest.mark.parametrize("number", [4, -1, True, 0.0])
    def test_no_such_sub_network(self, number):
        for call in (lively_elastic(), lively_elastic().base_model):
            with pytest.raises(ValueError, match="`sub_network` must be an integer from 0 to 3"):
                call(random_images(), sub_network=number)

    def test_has_no_stages(self):
        with pytest.raises(ValueError, match="do not think in stages"):
            stage_macs(lively_elastic().config)


def test_the_engine_runs_the_default():
    model, images = lively_elastic(default_sub_network=1), random_images(5)
    results = list(AdaptiveEngine(model, batch_size=2)(images))
    with torch.no_grad():
        expected = model(images, sub_network=1).logits
    torch.testing.assert_close(torch.stack([torch.as_tensor(result.logits) for result in results]), expected)


def test_a_plain_vit_of_the_same_sizes_has_the_same_parameters():
    plain = ViTForImageClassification(ViTConfig(**{**SIZES, "intermediate_size": 128}))
    assert lively_elastic().num_parameters() == plain.num_parameters()


class TestImportance:
    @pytest.mark.parametrize("method", METHODS)
    def test_sorts_and_leaves_the_whole_as_it_was(self, method):
        vit, pixel_values, labels = (
            trained_vit(num_hidden_layers=4).eval(),
            random_images(),
            torch.tensor([0, 1, 2] * 2),
        )
        plain = ElasticViTForImageClassification.from_vit(vit, method)
        model = ElasticViTForImageClassification.from_vit(vit, method, "importance", pixel_values, labels)
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=1e-5)
        assert not torch.equal(model.elastic_vit.layers[0].mlp.fc1.weight, plain.elastic_vit.layers[0].mlp.fc1.weight)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        # By what leaving a head or a channel out would change to first order, from masks on what they put out.
        F.cross_entropy(model(pixel_values).logits, labels).backward()
        for layer in model.elastic_vit.layers:
            for output, group in ((layer.attention.o_proj, 8), (layer.mlp.fc2, 1)):
                shares = (output.weight * output.weight.grad).sum(0).view(-1, group).sum(1).abs()
                assert (shares.diff() <= 1e-6).all() and shares[0] > shares[-1]

    def test_needs_images_labels_and_a_classifier(self):
        from_vit, images = ElasticViTForImageClassification.from_vit, random_images()
        with pytest.raises(ValueError, match="give as many labels as images"):
            from_vit(trained_vit(), "matformer", "importance", images, torch.zeros(5, dtype=torch.long))
        with pytest.raises(ValueError, match="`reorder` must be None, or 'importance'"):
            from_vit(trained_vit(), "matformer", "size")
        with pytest.raises(ValueError, match="keep its labels"):
            from_vit(trained_vit(), None, "importance", images, torch.zeros(6, dtype=torch.long), num_labels=7)
        with pytest.raises(ValueError, match="None of `sub_networks` is the whole model"):
            from_vit(trained_vit(), "hydravit", "importance", images, torch.zeros(6, dtype=torch.long), heads=[1, 2])
