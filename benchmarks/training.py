"""
A training step of ThinkingViT 3 → 6 against the steps of a Transformers ViT-Tiny and ViT-Small together, in one run:

    python -m benchmarks.training --batch-size 16
    python -m benchmarks.training --device cuda --batch-size 128 --mixed-precision bf16

224 × 224, 1000 labels, random images and weights; forward, backward and AdamW; the models take turns. Memory is that of
a step, without weights and optimizer: on CUDA the peak minus what was allocated before the step, on a CPU the tensors
that autograd saves for the backward pass.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import describe_run, measure
from benchmarks.rivals import plain_vit
from hf_thinkingvit import ThinkingViTConfig, ThinkingViTForImageClassification


def training_step(
    model: nn.Module, batch: dict[str, torch.Tensor], autocast: Callable[[], torch.autocast]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def step() -> None:
        with autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor], autocast: Callable[[], torch.autocast]) -> int:
    """Bytes of the activations that autograd saves, without weights and inputs. Each storage counts once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # the reference prevents that its address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        loss = model(**batch).loss
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.mixed_precision]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    torch.manual_seed(0)
    batch = {
        "pixel_values": torch.randn(arguments.batch_size, 3, 224, 224, device=device),
        "labels": torch.randint(0, 1000, (arguments.batch_size,), device=device),
    }
    models = {
        "ThinkingViT 3 → 6": ThinkingViTForImageClassification(ThinkingViTConfig(num_labels=1000)),
        "ViT-Tiny": plain_vit(3),
        "ViT-Small": plain_vit(6),
    }
    models = {name: model.to(device).train() for name, model in models.items()}
    steps = {name: training_step(model, batch, autocast) for name, model in models.items()}
    seconds = measure(steps, arguments.repeats, device)
    memory = {}
    for name, model in models.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            memory[name] = torch.cuda.max_memory_allocated() - before
        else:
            memory[name] = saved_bytes(model, batch, autocast)
    print(describe_run(device, f"mixed precision: {arguments.mixed_precision}, batch {arguments.batch_size}"))
    print("| model | images/s | MiB |\n|---|---|---|")
    for name in models:
        images = arguments.batch_size / statistics.median(seconds[name])
        print(f"| {name} | {images:.1f} | {memory[name] / 2**20:.0f} |")
    ours, tiny, small = seconds.values()
    ratio = statistics.median((one + other) / own for own, one, other in zip(ours, tiny, small))
    ours, tiny, small = memory.values()
    print(f"\nimages/s over those of ViT-Tiny and ViT-Small in sequence: {ratio:.3f}")
    print(f"memory over that of both: {ours / (tiny + small):.3f}")


if __name__ == "__main__":
    main()
