"""A ConvNet classifier of Fashion-MNIST: the offline metric space, and the fixed h(x) of the moment matching.

`python -m srmcmc_lib.classifier` trains the shipped one from nothing, on the images that the flagship learns from.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import paths
from .data import labels, observed, to_float

NAME = "fashion_mnist_classifier"


class Classifier(nn.Module):
    """Four 3×3 convolutions, each followed by batch normalisation and ReLU: [B, 1, 32, 32] in [-1, 1] → logits [B, 10].

    Their outputs are 32 maps at 32×32, 64 at 16×16, 128 at 8×8 and 128 at 8×8; the last are averaged over space.
    """

    channels, image_size, classes = 1, 32, 10

    def __init__(self):
        super().__init__()
        maps, strides = (1, 32, 64, 128, 128), (1, 2, 2, 1)
        self.stages = nn.Sequential()
        for (a, b), stride in zip(pairwise(maps), strides, strict=True):
            self.stages.append(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
        self.linear = nn.Linear(maps[-1], self.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stages(x).mean((2, 3)))


def train_classifier(images: Tensor, targets: Tensor, epochs: int, batch_size: int = 128, seed: int = 0) -> Classifier:
    """Cross-entropy, Adam with the one-cycle schedule, every other image mirrored; returned in eval mode.

    Args:
        images: uint8 [n, 1, 32, 32].
        targets: int64 [n], classes 0 … 9.
    """
    torch.manual_seed(seed)
    model = Classifier().train()
    steps = epochs * (len(images) // batch_size)
    adam = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=3e-3, total_steps=steps)
    for _ in tqdm(range(epochs), desc="classifier"):
        for batch in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x = to_float(images[batch]).contiguous(memory_format=torch.channels_last)
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(-1))
            loss = F.cross_entropy(model(x), targets[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def load_classifier(source: str | Path = NAME) -> Classifier:
    """The shipped classifier, or one from a .safetensors file; in eval mode, its parameters frozen.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds something else.
    """
    path = Path(source)
    path = path if path.suffix else paths.PRETRAINED / f"{source}.safetensors"
    if not path.exists():
        train = "`python -m srmcmc_lib.classifier --out srmcmc_lib/pretrained` trains it in minutes"
        raise FileNotFoundError(f"no classifier at {path}: {train if source == NAME else 'give a .safetensors file'}")
    model = Classifier()
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch have no common error
        raise ValueError(f"{path} is damaged or not a classifier ({error}); train it again") from error
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    from .features import responses  # not above: features imports this module

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=paths.checkpoints() / "retrained")  # overwrites nothing
    args = parser.parse_args()
    started = time.perf_counter()
    model = train_classifier(observed("fashion_mnist"), labels("fashion_mnist"), args.epochs, seed=args.seed)
    seconds = time.perf_counter() - started
    right = responses(model, observed("fashion_mnist", split="test")).argmax(1) == labels("fashion_mnist", "test")
    card = {
        "dataset": "fashion_mnist", "images": 40_000, "epochs": args.epochs, "seed": args.seed,
        "seconds": round(seconds), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "test_accuracy": right.float().mean().item(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / f"{NAME}.safetensors")
    (args.out / f"{NAME}.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card))
