"""Trains a model by a recipe: the name of one in workflow/recipes, or a .yaml file like them.

Of the last stage's checkpoints from update `select: first` on, the one whose samples are nearest to the training images
is kept. `start` is a model whose weights are trained on. Instead of stages, `moments` has settings of `moments.learn`,
for all images or those of one `label`. A stopped run goes on from its last checkpoint.
"""

import argparse
import json
import platform
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the library of this checkout

import torch
from parameters import Mistake, read_yaml
from run_notebook import ROOT, commit
from torch import Tensor
from tqdm.auto import tqdm

from srmcmc_lib import EnergyNet, Langevin, LinearEnergy, ShortRun, TrainConfig, moments, observed, paths, train
from srmcmc_lib.checkpoint import copy
from srmcmc_lib.data import labels, to_uint8
from srmcmc_lib.devices import PRECISIONS, arithmetic, ranks, resolved
from srmcmc_lib.features import responses
from srmcmc_lib.langevin import integer
from srmcmc_lib.metrics import embed, scores
from srmcmc_lib.training import grow

RECIPES = ROOT / "workflow/recipes"


def read_recipe(file: Path, precision: str | None = None) -> tuple[dict, list[tuple[int, dict]]]:
    """A recipe without `commit`, and (K, settings) of its stages; Mistake where it has a fault, in a late stage too."""
    recipe = {k: v for k, v in read_yaml(file).items() if k != "commit"}
    kind = "moments" if "moments" in recipe else "stages"
    try:
        optional = {"select", "start"} if kind == "stages" else {"label"}
        if {*recipe} - optional != {"dataset", "limit", "network", "seed", kind} or not recipe[kind]:
            raise ValueError(f"a recipe has dataset, limit, network, seed and {kind}, but here: {', '.join(recipe)}")
        stages = [(s["steps"], {k: v for k, v in s.items() if k != "steps"}) for s in recipe[kind]]
        for i, (K, settings) in enumerate(stages):
            settings.setdefault("seed", recipe["seed"] + i * (kind == "moments"))
            if kind == "moments":
                with suppress(AttributeError):  # `learn` checks its settings before it looks at the model
                    Langevin(K), settings["batch_size"], next(moments.learn(None, None, None, **settings))
            else:
                settings["precision"] = precision or settings.get("precision", "auto")
                Langevin(K), TrainConfig(**settings), settings["updates"]
        (EnergyNet if kind == "stages" else LinearEnergy)(**recipe["network"]), recipe["network"]["image_size"]
        if rule := recipe.get("select"):
            for key, low, high in (("first", 0, stages[-1][1]["updates"]), ("samples", 2, None), ("seed", 0, None)):
                integer(f"select: {key}", rule[key], low, high)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Mistake(f"{file}: {type(error).__name__}: {error} (write numbers as in 1.0e-4)") from None
    return recipe, stages


def run(file: Path, work: Path, out: Path, precision: str | None = None) -> Path:
    """Trains in `work`, then writes weights, logs and card to `out`; returns the weights' path."""
    recipe, stages = read_recipe(file, precision)
    name, by = file.stem, by_moments if "moments" in recipe else by_stages
    if by is by_moments and (precision or ranks().num_processes > 1):
        raise Mistake("moments are matched in float32 by one process: leave out --precision and the launcher")
    ranks().print(f"{name}: {ranks().num_processes} process(es), {ranks().device.type}", flush=True)
    with ranks().main_process_first():  # one of them downloads or prepares, the others find it done
        images = observed(recipe["dataset"], recipe["network"]["image_size"], recipe["limit"])
        if "label" in recipe:  # of one class
            images = images[labels(recipe["dataset"], limit=recipe["limit"]) == integer("label", recipe["label"], 0, 9)]
    work.mkdir(parents=True, exist_ok=True)
    model, card, logs = by(recipe, stages, images, work)
    if ranks().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for suffix, log in logs.items():
            copy(log, out / f"{name}{suffix}.csv")
        card["machine"] = f"{platform.machine()}, {model.device.type}, {torch.get_num_threads()} thread(s)"
        card |= {"images": len(images), "torch": torch.__version__, "commit": commit()}
        model.training = {"recipe": recipe, **card}
        (out / f"{name}.json").write_text(json.dumps(model.training, indent=1) + "\n")
        print(model.save(out / f"{name}.safetensors"))
    return out / f"{name}.safetensors"


def by_stages(recipe: dict, stages: list, images: Tensor, work: Path) -> tuple[ShortRun, dict, dict[str, Path]]:
    """The trained model, what its card says of it, and its logs."""
    rule, main, device, seconds = recipe.get("select"), ranks().is_main_process, ranks().device, 0.0
    logs = {f"-stage{i}": work / f"stage{i}.csv" for i in range(1, len(stages) + 1)}
    configs = [TrainConfig(**settings, checkpoint=str(log.with_suffix(".safetensors")), log=str(log))
               for (_, settings), log in zip(stages, logs.values(), strict=True)]  # fmt: skip
    embed(images[:1]) if rule else None  # fail before training if the classifier does not take such images
    torch.manual_seed(recipe["seed"])
    model = ShortRun(EnergyNet(**recipe["network"]), Langevin(stages[0][0]), dataset=recipe["dataset"]).to(device)
    if "start" in recipe:  # another model's weights, which `grow` scales to the first stage's K
        model.f.load_state_dict((first := ShortRun.load(recipe["start"])).f.state_dict())
        model.kernel, model.training = first.kernel, {"last": {"start": recipe["start"]}}
    for i, ((K, _), config) in enumerate(zip(stages, configs, strict=True), start=1):
        model, before = grow(model, K), {k: v for k, v in model.training.get("last", {}).items() if k != "seconds"}
        model.training, keeps = {"before": before}, rule and main and i == len(stages)
        updates = train(model, images, config)  # none where an earlier run had finished this stage
        if model.training.get("before", before) != before:
            raise Mistake(f"{work}/stage{i}.* began from another model: delete them and later stages")
        begun = model.training.get("last", {}).get("step", 0)
        if keeps and not begun:  # it starts anew
            [*map(Path.unlink, work.glob("candidate-*"))]  # those of another run
        for t in chain([begun], (record.step for record in updates)):  # killed at `begun`, a run has not kept that
            if keeps and t >= rule["first"] and (t % config.checkpoint_every == 0 or t == config.updates):
                kept = work / f"candidate-{t}.safetensors"
                copy(config.checkpoint, kept) if t else model.save(kept)  # what it starts from may be the nearest
        seconds += model.training["last"]["seconds"]
    card = {"precision": ", ".join({resolved(c.precision, device): 0 for c in configs})}
    if rule and main:
        model, card["selection"] = select(work, range(rule["first"], config.updates + 1), images, rule)
    return model, card | {"hours": round(seconds / 3600, 3)}, logs


def select(work: Path, steps: range, images: Tensor, rule: dict) -> tuple[ShortRun, dict]:
    """The candidate of least classifier_frechet to the training images, and all these distances."""
    distances, device = {}, ranks().device
    with arithmetic("float32", device):
        reference = embed(images, device=device)
        for path in filter(Path.exists, (work / f"candidate-{t}.safetensors" for t in steps)):
            samples = to_uint8(ShortRun.load(path, device=device).sample(rule["samples"], rule["seed"]).cpu())
            distances[path.stem] = scores(embed(samples, device=device), reference)["classifier_frechet"]
            print(f"{path.stem}: classifier_frechet {distances[path.stem]:.2f}", flush=True)
    best = work / f"{min(distances, key=distances.get)}.safetensors"
    return ShortRun.load(best, device=device), {"classifier_frechet": distances}


def by_moments(recipe: dict, stages: list, images: Tensor, work: Path) -> tuple[ShortRun, dict, dict[str, Path]]:
    """The same with moment matching: minutes on a CPU, without checkpoints."""
    model, started, step = ShortRun(LinearEnergy(**recipe["network"]), dataset=recipe["dataset"]), time.time(), 0
    data = responses(model.f.h, images).mean(0)  # E_data[h]
    start = responses(model.f.h, model.draw_z(2_000, recipe["seed"])).mean(0)  # E_p0[h]
    with (log := work / "moments.csv").open("w") as file:
        print("step,steps,relative", file=file)
        for K, settings in stages:
            model = grow(model, K)
            for update in tqdm(moments.learn(model, data, images, **settings), f"K = {K}", settings["updates"]):
                step += 1
                print(step, K, (update.delta.norm() / (data - start).norm()).item(), sep=",", file=file)
    card = {"hours": round((time.time() - started) / 3600, 3), "data": data.tolist(), "start": start.tolist()}
    return model, card, {"": log}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, help="checkpoints on the way (default: checkpoints/NAME)")
    parser.add_argument("--out", type=Path, help="default: checkpoints/retrained, or beside your own recipe")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the chain (default: the recipe's, or auto)")
    args = parser.parse_args()
    file = file if (file := Path(args.name)).suffix else RECIPES / f"{args.name}.yaml"
    out = args.out or (paths.checkpoints() / "retrained" if RECIPES in file.resolve().parents else file.parent)
    run(file, args.work or paths.checkpoints() / file.stem, out, args.precision)
    ranks().destroy_process_group()
