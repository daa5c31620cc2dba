"""Training with `Trainer` and with `DistributedDataParallel`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.models import train_distributed
from tests.models.test_modeling_avit import lively_avit
from tests.utils import lively_model, lively_swin, random_images


@pytest.mark.parametrize(
    "model",
    [lively_model(num_labels=4, threshold=0.3), lively_swin(num_labels=4, threshold=0.3), lively_avit(num_labels=4)],
    ids=lambda m: m.config.model_type,
)
def test_trainer_without_a_subclass(model, tmp_path):
    pixel_values = random_images(48)
    labels = torch.arange(48) % 4
    pixel_values += labels[:, None, None, None].float()
    dataset = Dataset.from_dict({"pixel_values": pixel_values.numpy(), "labels": labels.numpy()}).with_format("torch")
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"] = prediction.predictions
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, compute_metrics=compute_metrics)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert seen["predictions"].shape == (48, 4)  # the logits alone, as for any classifier
    assert after["eval_accuracy"] > before["eval_accuracy"] and after["eval_loss"] < before["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert (checkpoint / f"modeling_{model.config.model_type}.py").is_file()
    loaded = type(model).from_pretrained(checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model.eval()(pixel_values).logits)


DISTRIBUTED = [
    ("thinkingvit", {}),
    ("thinkingvit", {"thinking_stages": [2, 2], "hidden_size": 16}),
    ("thinking_swin", {}),
    ("thinking_swin", {"qkv_slicing": "each_projection", "head_rounds": [[1, 2], [1, 2]], "num_heads": [1, 2]}),
    # The prior uses averages over a batch, which differ for two half batches.
    ("avit", {"distilled": True, "prior_loss_weight": 0.0}),
]


@pytest.fixture(scope="module")
def trained_by_two_processes(tmp_path_factory) -> Path:
    """The folder with the weights of each of `DISTRIBUTED`, trained in one launch because launching is slow."""
    output_dir, script = tmp_path_factory.mktemp("distributed"), Path(train_distributed.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    arguments = [str(script), str(output_dir), json.dumps(DISTRIBUTED)]
    process = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr
    return output_dir


@pytest.mark.parametrize("index", range(len(DISTRIBUTED)))
def test_two_distributed_processes_train_as_one(index, trained_by_two_processes):
    family, overrides = DISTRIBUTED[index]
    model = train_distributed.FAMILIES[family](**overrides).train()
    train_distributed.train(model, slice(0, 8))
    distributed_weights = torch.load(trained_by_two_processes / f"{index}.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            distributed_weights[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}"
        )
