"""Trains a shipped model from nothing by its recipe: `python -m srmcmc_lib.recipes fashion_mnist_mini`.

A recipe, pretrained/NAME.yaml, names the data, the network, the seed and stages of learning. Stages after the first
start from the model that `grow` makes of the one before: short chains are cheap, and the last stage has the K that is
shipped. The seed is θ_0's, and that of all stages which give none of their own (these see the same draws again). A
stopped run goes on where its last checkpoint was. Instead of stages, `moments` lists settings of `moments.learn`; the
network is then a LinearEnergy. `select` says which checkpoint of the last stage is shipped.
"""

import argparse
import json
import platform
import shutil
from inspect import signature
from pathlib import Path

import torch
import yaml
from torch import Tensor

from . import moments, paths
from .checkpoint import copy, find
from .data import observed, to_uint8
from .devices import PRECISIONS, arithmetic, ranks
from .energy import EnergyNet, check_scalable, scale
from .langevin import Langevin
from .metrics import embed, scores
from .profiles import Loader
from .records import Record, read_log
from .shortrun import ShortRun
from .training import TrainConfig, train


def read_recipe(name: str) -> dict:
    """The recipe of that name, or in that .yaml file; ValueError names an unknown or a missing key."""
    path = find(name, ".yaml")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader that reads 1e-4 as a number
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    recipe = recipe if isinstance(recipe, dict) else {}
    kind, learner, always = "stages", TrainConfig, {"steps", "updates"}
    if "moments" in recipe:
        kind, learner, always = "moments", moments.learn, {"steps", "updates", "batch_size"}
    stages = recipe.get(kind)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path}: a recipe is a mapping, its stages or moments a list of settings; see a shipped one")
    rule, keys = recipe.get("select"), {"dataset", "limit", "network", "seed", kind}
    if recipe.keys() - ({"select"} if kind == "stages" else set()) != keys:
        raise ValueError(f"{path}: the keys must be {sorted(keys)}, got {sorted(recipe)}")
    known = {"steps", *signature(learner).parameters} - {"model", "data", "images"}
    for stage in stages:
        if stage.keys() - known or always - stage.keys():
            raise ValueError(f"{path}: a stage takes {sorted(known)}; {sorted(always)} always; got {sorted(stage)}")
    if rule is not None and rule.keys() != {"first", "samples", "seed"}:
        raise ValueError(f"{path}: select needs first, samples and seed, got {sorted(rule)}")
    if rule and rule["first"] > recipe["stages"][-1]["updates"]:
        raise ValueError(f"{path}: select starts at update {rule['first']}, after the last stage's end")
    return recipe


def run(name: str, work: Path, out: Path, **options) -> Path:
    """Trains the stages of a recipe in `work` (checkpoints and logs), then writes NAME.safetensors, its log (.csv) and
    its card (.json) to `out`; returns the weights' path.

    It learns on the GPU where there is one, and on all of those that `accelerate launch` or notebook_launcher gave.
    `options` are settings of TrainConfig that go before the recipe's: precision, compile, sub_batch, alarm. A recipe of
    `moments` takes minutes: it runs on the CPU, without checkpoints or options.
    """
    recipe = read_recipe(name)
    name = find(name, ".yaml").stem
    if "moments" in recipe:
        if options:
            raise ValueError(f"{', '.join(options)}: a recipe of moments, in one piece on the CPU, does not take them")
        if ranks().num_processes > 1:
            raise ValueError(f"a recipe of moments learns in one process, not in {ranks().num_processes}")
        trained = moments.run(recipe, work / f"{name}.csv")
        out.mkdir(parents=True, exist_ok=True)
        copy(work / f"{name}.csv", out / f"{name}.csv")  # now: a run stopped on its way leaves the finished files alone
        return _ship(*trained, recipe, out / name)
    if ranks().is_main_process:
        print(f"{name}: {ranks().num_processes} process(es), {ranks().device.type}", flush=True)
    with ranks().main_process_first():  # one of them downloads or prepares, the others find it done
        images = observed(recipe["dataset"], recipe["network"]["image_size"], recipe["limit"])
    configs = []  # all of them now: a setting out of range is no news to get after the first stage
    for i, stage in enumerate(recipe["stages"], start=1):
        files = {"checkpoint": str(work / f"stage{i}.safetensors"), "log": str(work / f"stage{i}.csv")}
        settings = {k: v for k, v in stage.items() if k != "steps"} | options
        configs.append(TrainConfig(**{"seed": recipe["seed"]} | settings | files))
    if "select" in recipe:
        embed(images[:1])  # images that the classifier does not take are refused now, not after the learning
    torch.manual_seed(recipe["seed"])
    stages, learned = recipe["stages"], None
    model = ShortRun(EnergyNet(**recipe["network"]), Langevin(stages[0]["steps"]), dataset=recipe["dataset"])
    for i, (stage, config) in enumerate(zip(stages, configs, strict=True), start=1):
        model = grow(model, stage["steps"])  # which leaves the first stage's as it is
        model.to(ranks().device).training = {}
        if learned and Path(config.checkpoint).exists():
            raise ValueError(f"{config.checkpoint} comes from an earlier {learned}: delete it, stage {i} starts anew")
        candidates = _candidates(recipe, config, work) if i == len(stages) else {}
        for record in train(model, images, config):  # nothing to do where an earlier run had finished this stage
            learned = f"stage {i}"
            if record.step in candidates and ranks().is_main_process:
                copy(config.checkpoint, candidates[record.step])
    if not ranks().is_main_process:
        return out / f"{name}.safetensors"
    if candidates:
        copy(config.checkpoint, candidates[config.updates])
        model = select([path for path in candidates.values() if path.exists()], images, recipe["select"])
    out.mkdir(parents=True, exist_ok=True)
    for i, config in enumerate(configs, start=1):
        shutil.copyfile(config.log, out / f"{name}-stage{i}.csv")
    return _ship(model, len(images), sum(read_log(c.log)[-1].seconds for c in configs), recipe, out / name, options)


def _candidates(recipe: dict, config: TrainConfig, work: Path) -> dict[int, Path]:
    """The updates of the last stage whose checkpoints `select` compares, and where they are kept."""
    if "select" not in recipe:
        return {}
    steps = range(config.checkpoint_every, config.updates + 1, config.checkpoint_every)
    steps = [step for step in steps if step >= recipe["select"]["first"]]
    return {step: work / f"candidate-{step}.safetensors" for step in [*steps, config.updates]}


def _ship(model: ShortRun, images: int, seconds: float, recipe: dict, stem: Path, options: dict | None = None) -> Path:
    card = {
        "recipe": recipe,
        **({"options": options} if options else {}),
        "images": images,
        "hours": round(seconds / 3600, 3),
        "machine": f"{platform.machine()}, {model.device.type}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
    } | {k: v for k, v in model.training.items() if k in ("data", "start", "selection")}
    model.training = card
    path = model.save(stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return path


def select(candidates: list[Path], images: Tensor, rule: dict) -> ShortRun:
    """The checkpoint whose samples have the least classifier_frechet to the training images; held-out images play no
    part. `rule` gives the number of samples and their seed. The distances go on the model's card."""
    distances = {}
    with arithmetic("float32", ranks().device):
        reference = embed(images)
        for path in candidates:
            model = ShortRun.load(path).to(ranks().device)
            samples = to_uint8(model.sample(rule["samples"], rule["seed"]).cpu())
            distances[path] = scores(embed(samples), reference)["classifier_frechet"]
            print(f"{path.stem}: classifier_frechet {distances[path]:.2f}", flush=True)
    model = ShortRun.load(min(distances, key=distances.get)).to(ranks().device)
    model.training["selection"] = {"classifier_frechet": {path.stem: value for path, value in distances.items()}}
    return model


def grow(model: ShortRun, steps: int) -> ShortRun:
    """The model with another K and almost the same images: f is scaled by K_old / K_new, so K·s·f' is kept.

    K·‖∂f/∂x‖ hardly depends on K (Table 2), so a model learned with a cheap short chain is a good start for learning
    with the paper's K = 100. Our own device, not the paper's. Scales model.f in place; ValueError where that cannot be.
    """
    grown = model.with_steps(steps)
    check_scalable(model.f)
    scale(model.f, model.kernel.steps / steps)
    return grown


def learning_curves(source: str | Path) -> list[tuple[int, list[Record]]]:
    """(K, records) of each stage of a model trained by `run`; an empty list for a model that has no logs beside it."""
    path = find(source)
    stages = ShortRun.load(path).training.get("recipe", {}).get("stages", [])
    logs = [path.with_name(f"{path.stem}-stage{i}.csv") for i in range(1, len(stages) + 1)]
    return [(stage["steps"], read_log(log)) for stage, log in zip(stages, logs, strict=True) if log.exists()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a recipe of srmcmc_lib/pretrained, or a .yaml file like them")
    parser.add_argument("--work", type=Path, help="checkpoints of a run under way (default: checkpoints/NAME)")
    out = "where the finished files go (default: checkpoints/retrained for a shipped recipe, else beside yours)"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--precision", choices=PRECISIONS, help="of f and its gradient (default: the recipe's)")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile f")
    parser.add_argument("--sub-batch", type=int, help="images a device takes at once (default: what its memory holds)")
    args = parser.parse_args()
    options = {k: v for k in ("precision", "compile", "sub_batch") if (v := getattr(args, k)) is not None}
    recipe = find(args.name, ".yaml")
    shipped = recipe.resolve().parent == paths.PRETRAINED.resolve()  # whose weights are not to be overwritten unasked
    out = args.out or (paths.checkpoints() / "retrained" if shipped else recipe.parent)
    path = run(args.name, args.work or paths.checkpoints() / recipe.stem, out, **options)
    if ranks().is_main_process:
        print(path)
    ranks().destroy_process_group()
