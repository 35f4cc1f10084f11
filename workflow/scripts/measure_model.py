"""Measures a model: prints every number; --write puts them on its card, the .json file beside the weights."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

from srmcmc_lib import LinearEnergy, ShortRun, moments, observed, paths
from srmcmc_lib.checkpoint import aside, find
from srmcmc_lib.data import CLASSES, to_float, to_uint8
from srmcmc_lib.devices import arithmetic, ranks
from srmcmc_lib.langevin import chain, integer
from srmcmc_lib.metrics import NAMES, class_shares, embed, nearest_images, sanity_rows, scores
from srmcmc_lib.noise import chain_noise


def measure(source, samples: int = 10_000, seed: int = 0, space: str = "classifier", precision="float32") -> dict:
    """Every number of a model, JSON-compatible; of a LinearEnergy, how well the moments match.

    rows: scores against the training images; to_test: the samples' against the test images; memorisation: the median
    distance of 1,000 images to the nearest training image; force: K·‖∂f/∂x‖, mean of 128 chains.
    """
    integer("samples", samples, 100)
    device, model = ranks().device, ShortRun.load(source, device=ranks().device, precision=precision)
    if isinstance(model.f, LinearEnergy):
        m = moments.match(ShortRun.load(source).f.h.to(device), model.sample(samples, seed), *moments.targets(model))
        error = {"beyond_4_standard_errors": m.beyond()}
        return {"samples": samples, "seed": seed, "relative": m.relative, "by_chance": m.by_chance} | error
    if space == "classifier" and not model.dataset.startswith("fashion_mnist"):
        raise ValueError(f"the classifier knows Fashion-MNIST, not {model.dataset!r}: take --space inception")
    n, size = (t := model.training).get("images") or t.get("config", {"images": [40_000]})["images"][0], model.shape[1]
    training, held_out = observed(model.dataset, size, n), observed(model.dataset, size, split="test")
    measured = {"samples": samples, "seed": seed, "reference": f"the {len(training):,} training images"}
    with arithmetic("float32", device):
        learned = embed(training, space, device=device)  # first: it fails where the space does not take such images
        x = model.sample(samples, seed).cpu()
        images = {"samples": to_uint8(x), **sanity_rows(held_out, seed)}
        rows = {name: embed(row, space, device=device) for name, row in images.items()}
        U = chain_noise(seed, model.kernel.steps, model.shape, 128, 0, device)
        steps = chain(model.f, model.draw_z(128, seed), model.kernel, U)
        measured["force"] = sum(slope.flatten(1).norm(dim=1).mean().item() for _, slope in steps)
    measured["rows"] = {name: scores(row, learned, space, seed) for name, row in rows.items()}
    measured["to_test"] = scores(rows["samples"], rows["test images"], space, seed)
    shown, memory = {"samples": x[:1_000].clamp(-1, 1), "held_out": to_float(held_out[:1_000])}, to_float(training)
    measured["memorisation"] = {name: nearest_images(v, memory)[0].median().item() for name, v in shown.items()}
    if space == "classifier":
        share, measured["entropy"] = class_shares(rows["samples"][1])
        measured["classes"] = dict(zip(CLASSES, share.tolist(), strict=True))
    return measured


def table() -> str:
    """What README.md and docs/models.md say of the shipped models, from their cards."""
    head = "| model | K | n_f | activation | hours | updates | classifier_frechet | classes ≥ 3 % | K·‖∂f/∂x‖ |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for path in sorted(paths.PRETRAINED.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        if m := card.get("measured", {}).get("classifier"):
            network, stages = card["recipe"]["network"], card["recipe"]["stages"]
            samples, *real = (f"{row['classifier_frechet']:.3g}" for row in [*m["rows"].values()][:3])
            values = (f"`{path.stem}`", stages[-1]["steps"], network["width"], network.get("activation", "leaky_relu"),
                      card["hours"], f"{sum(s['updates'] for s in stages):,}", samples,
                      sum(v >= 0.03 for v in m["classes"].values()), round(m["force"]))  # fmt: skip
            lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join([*lines, "", f"classifier_frechet of test images: {real[0]}; with N(0, 0.1²) added: {real[1]}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="a shipped model or a .safetensors file; none: --table")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", choices=NAMES, default="classifier")
    parser.add_argument("--precision", choices=("float32", "bf16", "auto"), default="float32", help="of the chain")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the table of the shipped models, measure nothing")
    args = parser.parse_args()
    if args.table or not args.name:
        sys.exit(print(table()))
    file = find(args.name).with_suffix(".json")
    card = json.loads(file.read_text(encoding="utf-8")) if args.write else {}  # before measuring: there may be none
    measured = measure(args.name, args.samples, args.seed, args.space, args.precision)
    print(json.dumps(measured, indent=1, ensure_ascii=False))
    if args.write:
        kind = args.space if "rows" in measured else "moments"
        command = f"python workflow/scripts/measure_model.py {args.name} --samples {args.samples} --seed {args.seed}"
        command += f" --space {args.space} --precision {args.precision}"
        card.setdefault("measured", {})[kind] = {"command": command, **measured}
        with aside(file) as part:
            part.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
