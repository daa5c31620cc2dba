import subprocess
import sys

import pytest
import torch

from hf_thinkingvit.models.token_packing import packed_attention


LENGTHS = {  # queries, keys
    "equal": ((4, 4, 4), (4, 4, 4)),
    "different": ((5, 1, 9, 3), (5, 1, 9, 3)),
    "class tokens only": ((1, 1, 1), (7, 2, 12)),
    "without queries": ((2, 0, 1), (6, 4, 3)),
    "no queries at all": ((0, 0), (3, 5)),
}


def masked_attention(query, key, value, query_lengths, key_lengths, scaling):
    """Reference: attention over all packed tokens, with those of other images masked out."""
    owner = [
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in (query_lengths, key_lengths)
    ]
    mask = (owner[0][:, None] == owner[1][None, :]).to(query.device)
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


def compare(name: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    query_lengths, key_lengths = LENGTHS[name]
    generator = torch.Generator().manual_seed(0)
    # Strided as in the model: (1, tokens, heads, head_dim), transposed.
    query, key, value = (
        torch.randn(1, sum(lengths), 3, 16, generator=generator).to(device, dtype).transpose(1, 2)
        for lengths in (query_lengths, key_lengths, key_lengths)
    )
    expected = masked_attention(query.float(), key.float(), value.float(), query_lengths, key_lengths, 0.25)
    output = packed_attention(query, key, value, query_lengths, key_lengths, 0.25)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", LENGTHS)
def test_an_image_attends_to_its_own_tokens(name):
    compare(name, "cpu", torch.float32, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LENGTHS)
def test_an_image_attends_to_its_own_tokens_on_cuda(name, dtype):
    compare(name, "cuda", dtype, 1e-5 if dtype == torch.float32 else 2e-2)


OLDER_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn.attention.varlen":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
import torch
from hf_thinkingvit import AViTConfig, AViTForImageClassification
from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification

sizes = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
model = ThinkingViTForImageClassification(ThinkingViTConfig(thinking_stages=[1, 2], hidden_size=16, **sizes)).eval()
model(torch.randn(2, 3, 32, 32))
model = AViTForImageClassification(AViTConfig(num_attention_heads=2, hidden_size=16, **sizes)).eval()
model(torch.randn(2, 3, 32, 32))
from hf_thinkingvit.models.token_packing import variable_length_kernel
assert variable_length_kernel() is None
"""


def test_models_run_where_torch_has_no_variable_length_attention():
    subprocess.run([sys.executable, "-c", OLDER_TORCH], check=True)
