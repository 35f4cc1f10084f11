"""The cards of shipped models: `python -m srmcmc_lib.cards fashion_mnist` measures one, `--table` prints them all.

A card is the JSON file beside the weights. Training writes the first half (`recipes.run`), this module the second,
"measured": every number with the sample count, the reference and the command that gives it again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from . import paths
from .checkpoint import find
from .checks import integer
from .data import CLASSES, observed, to_float, to_uint8
from .devices import arithmetic, ranks
from .metrics import NAMES, class_histogram, embed, nearest_images, sanity_rows, scores
from .recipes import learning_curves
from .shortrun import ShortRun

NEAREST = 1_000  # samples and test images whose nearest training image is sought


def measure(source: str | Path, samples: int = 10_000, seed: int = 0, space: str = "classifier") -> dict:
    """Every metric of a model of Fashion-MNIST, against the images it learned from and images held out (the 10,000 test
    images; 2,000 of them for the mini set, which learns from the others).

    Args:
        source: as for ShortRun.load.
        samples: how many to draw, at least 100 (the paper: 40,000).
        seed: of the samples, the sanity rows and the kernel distance's subsets.
        space: "classifier" or "inception", see `metrics`.

    Returns:
        JSON-compatible: rows (name → scores against the training images), to_test (scores against the test images),
        classes and entropy (classifier space only), memorisation, force (K·‖∂f/∂x‖, mean of the last 50 updates).

    Raises:
        ValueError: too few samples, a model of another data set.
    """
    integer("samples", samples, 100)
    model = ShortRun.load(source).to(ranks().device)
    if not model.dataset.startswith("fashion_mnist") or model.f.image_size != 32:
        raise ValueError(
            f"{source} learned {model.dataset!r} at {model.f.image_size}²: the cards are of Fashion-MNIST at 32²"
        )
    training = observed(model.dataset, limit=model.training.get("recipe", {}).get("limit", 40_000))
    held_out = observed(model.dataset, split="test")
    started = time.perf_counter()
    with arithmetic("float32", model.device):
        x = model.sample(samples, seed).cpu()
        seconds = time.perf_counter() - started
        rows = {name: embed(images, space) for name, images in sanity_rows(held_out, seed).items()}
        drawn, learned, test = embed(to_uint8(x), space), embed(training, space), rows["test images"]
    memory, shown = to_float(training), (x[:NEAREST].clamp(-1, 1), to_float(held_out[:NEAREST]))
    distances = [nearest_images(v, memory)[0] for v in shown]
    measured = {
        "samples": samples, "seed": seed, "seconds_per_1000_samples": round(1000 * seconds / samples, 1),
        "threads": torch.get_num_threads(), "reference": f"the {len(training):,} training images",
        "rows": {name: scores(e, learned, space, seed) for name, e in {"samples": drawn, **rows}.items()},
        "to_test": scores(drawn, test, space, seed),
        "memorisation": dict(zip(("samples", "held_out"), (d.median().item() for d in distances), strict=True)),
    }  # fmt: skip
    if space == "classifier":
        share, entropy = class_histogram(drawn[1])
        measured |= {"classes": dict(zip(CLASSES, share.tolist(), strict=True)), "entropy": entropy}
    if curves := learning_curves(source):
        steps, records = curves[-1]
        last = [r.grad_norm for r in records[-50:]]
        measured["force"] = steps * sum(last) / len(last)
    return measured


def report(measured: dict, space: str) -> str:
    """The measurements as text, one line a row."""
    lines = [f"reference: {measured['reference']}; {measured['samples']:,} samples, seed {measured['seed']}"]
    for name, row in [*measured["rows"].items(), ("samples, to the held-out images", measured["to_test"])]:
        lines.append(
            f"{name:34}" + "  ".join(f"{k} {row[k]:.4g}" for k in NAMES[space]) + f"  ({row['images']:,} images)"
        )
    if "classes" in measured:
        lines.append("classes: " + ", ".join(f"{k} {v:.1%}" for k, v in measured["classes"].items()))
        lines.append(f"entropy of the classes: {measured['entropy']:.3f} of {torch.tensor(len(CLASSES)).log():.3f}")
    near = measured["memorisation"]
    lines.append(f"median distance to the nearest training image: samples {near['samples']:.3f}, held-out images "
                 f"{near['held_out']:.3f}")  # fmt: skip
    if "force" in measured:
        lines.append(f"K·‖∂f/∂x‖ at the end of learning: {measured['force']:.1f}")
    return "\n".join(lines)


def card_of(source: str | Path) -> Path:
    """The card beside a model's weights; FileNotFoundError where there is none."""
    path = find(source).with_suffix(".json")
    if not path.exists():
        raise FileNotFoundError(f"no card {path} to write on: `python -m srmcmc_lib.recipes` makes one with a model")
    return path


def write(source: str | Path, kind: str, command: str, measured: dict) -> None:
    """Puts measurements, and the command that gives them again, on the card beside a model's weights."""
    path = card_of(source)
    card = json.loads(path.read_text(encoding="utf-8"))
    card.setdefault("measured", {})[kind] = {"command": command, **measured}
    path.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table() -> str:
    """The README's table of shipped models (Fréchet distances in the classifier's space), from the cards alone."""
    head = (
        "model | K | n_f | activation | images | hours | updates | classifier_frechet | of test images + N(0, 0.1²)"
        " | of test images | classes of at least 3 % | K·‖∂f/∂x‖"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    for path in sorted(paths.PRETRAINED.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        if "stages" not in card.get("recipe", {}) or "classifier" not in card.get("measured", {}):
            continue
        network, stages, m = card["recipe"]["network"], card["recipe"]["stages"], card["measured"]["classifier"]
        frechet = {name: f"{row['classifier_frechet']:.3g}" for name, row in m["rows"].items()}
        values = (f"`{path.stem}`", stages[-1]["steps"], network["width"], network.get("activation", "leaky_relu"),
                  f"{card['images']:,}", card["hours"], f"{sum(s['updates'] for s in stages):,}", frechet["samples"],
                  frechet["test images + N(0, 0.1²)"], frechet["test images"],
                  sum(v >= 0.03 for v in m["classes"].values()), f"{m['force']:.0f}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="a shipped model or a .safetensors file")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", choices=NAMES, default="classifier")
    parser.add_argument("--write", action="store_true", help="put the measurements on the card beside the weights")
    parser.add_argument("--table", action="store_true", help="print the table of the README, measuring nothing")
    args = parser.parse_args()
    if args.table or not args.name:
        print(table())
    else:
        if args.write:
            card_of(args.name)  # missing, it is missed before the measuring
        measured = measure(args.name, args.samples, args.seed, args.space)
        print(report(measured, args.space))
        if args.write:
            command = f"python -m srmcmc_lib.cards {find(args.name).stem}"
            command += f" --samples {args.samples} --seed {args.seed} --space {args.space}"
            write(args.name, args.space, command, measured)
