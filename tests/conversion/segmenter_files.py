"""The golden segmentation weights in the form in which the authors publish theirs: a training checkpoint and a YAML."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.utils import FIXTURES


VARIANT = """\
dataset_kwargs:
  dataset: ade20k
inference_kwargs:
  im_size: {side}
net_kwargs:
  backbone: vit_tiny_patch16_384
  d_model: {d_model}
  decoder:
    drop_path_rate: 0.0
    dropout: 0.1
    n_heads: {decoder_heads}
    name: {decoder}
  image_size: !!python/tuple
  - {side}
  - {side}
  n_cls: {n_cls}
  n_heads: {n_heads}
  n_layers: {n_layers}
  patch_size: {patch_size}
  pretrained_path: /home/somebody/HydraViT.tar
thinking_kwargs:
  loss_weights: null
  stages: [{stages}]
  threshold: {threshold}
"""


def write_official(golden: str, folder: Path, threshold: float = 0.5, change=lambda state_dict: state_dict) -> Path:
    """A folder with `{golden}.pth.tar`, of the weights as `change` returns them, and `variant.yml`."""
    config = json.loads((FIXTURES / golden / "config.json").read_text())
    state_dict = change(load_file(FIXTURES / golden / "model.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": state_dict, "optimizer": {"state": {}}, "n_cls": config["n_cls"], "epoch": 3}
    torch.save(content, folder / f"{golden}.pth.tar")
    text = VARIANT.format(
        side=config["image_size"][0],
        decoder=config["decoder"]["name"],
        decoder_heads=config["decoder"].get("n_heads", "null"),
        stages=", ".join(map(str, config["thinking_stages"])),
        threshold=threshold,
        **{name: config[name] for name in ("d_model", "n_cls", "n_heads", "n_layers", "patch_size")},
    )
    (folder / "variant.yml").write_text(text)
    return folder
