import torch

from hf_thinkingvit.families.official_supernet import cut_supernet


def test_cut_takes_each_third_and_any_mlp_ratio():
    qkv, fc1 = torch.arange(12.0).expand(4, 12).T.contiguous(), torch.arange(24.0).reshape(6, 4)
    state_dict = {"blocks.0.attn.qkv.weight": qkv, "blocks.0.mlp.fc1.weight": fc1, "head.weight": fc1}
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    cut = cut_supernet({**state_dict, "alpha.0": qkv[:1], "alpha.1": qkv[:1]}, num_heads=2, thinking_stages=[1])
    assert cut["blocks.0.attn.qkv.weight"].tolist() == [[row, row] for row in (0, 1, 4, 5, 8, 9)]
    assert torch.equal(cut["blocks.0.mlp.fc1.weight"], fc1[:3, :2])
    assert torch.equal(cut["head.weight"], fc1[:, :2])
    assert cut.keys() == state_dict.keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in before.items())
