"""Trains the classifier whose features measure distances, on the 40,000 embedded images: minutes."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from srmcmc_lib import observed, paths
from srmcmc_lib.data import labels, to_float
from srmcmc_lib.features import NAME, Classifier, responses


def train_classifier(images: Tensor, targets: Tensor, epochs: int, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Cross-entropy, Adam with the one-cycle schedule, half of the images mirrored; images uint8 [n, 1, 32, 32]."""
    torch.manual_seed(seed)
    model, batches = Classifier().train(), len(images) // batch_size
    adam = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=3e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="classifier"):
        for batch in torch.randperm(len(images)).split(batch_size)[:batches]:
            x = to_float(images[batch]).contiguous(memory_format=torch.channels_last)
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(-1))
            adam.zero_grad()
            F.cross_entropy(model(x), targets[batch]).backward()
            adam.step()
            schedule.step()
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    out, epochs = paths.checkpoints() / "retrained", 7  # not over the shipped one
    started, (test, classes) = time.perf_counter(), (f("fashion_mnist", split="test") for f in (observed, labels))
    model = train_classifier(observed("fashion_mnist"), labels("fashion_mnist"), epochs)
    card = {"dataset": "fashion_mnist", "images": 40_000, "epochs": epochs, "seed": 0}
    card |= {"seconds": round(time.perf_counter() - started), "torch": torch.__version__}
    card["test_accuracy"] = (responses(model, test).argmax(1) == classes).float().mean().item()
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / f"{NAME}.safetensors")
    (out / f"{NAME}.json").write_text(json.dumps(card, indent=1) + "\n")
