# The graph behind `make figures`: one job an entry of profiles/<profile>.yaml, and a page with all their figures.
# `make checkpoints` is the target "checkpoints": every shipped model, learned again from nothing.
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)  # the library of this checkout, installed or not
from srmcmc_lib import gallery, profiles, runner

PROFILE = Path("profiles") / f"{config.get('profile', runner.DEFAULT_PROFILE)}.yaml"
NOTEBOOKS = Path("notebooks")
# Snakemake deletes the outputs of a job before it runs and when it fails, and the last good figures must survive both:
# so a job's output is a stamp.
STAMPS = Path(".cache/stamps") / PROFILE.stem

# Snakemake sets these to the job's threads, 1 under --cores 1; a notebook shall have all cores, or what the user set.
LIMITS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "GOTO", "NUMEXPR")]
LIMITS = [(limit, os.environ.get(limit)) for limit in (*LIMITS, "VECLIB_MAXIMUM_THREADS")]
ENV = " ".join(f"-u {k}" for k, v in LIMITS if v is None) + "".join(f" {shlex.quote(f'{k}={v}')}" for k, v in LIMITS if v)

profiles.check(PROFILE, NOTEBOOKS)
RESOURCES = profiles.resources(PROFILE)
try:
    CORES = RESOURCES["cpus"] if workflow.remote_exec else workflow.cores  # here: all, for one notebook at a time
except WorkflowError:  # submitting to a cluster, --cores is not given; in the job it is, as all of the node's
    CORES = RESOURCES["cpus"]
PLANS, COMMANDS, TRAINED = {}, {}, {}
for entry in profiles.read_profile(PROFILE):
    name, variant = profiles.split(entry)
    notebook = NOTEBOOKS / f"{name}.ipynb"
    plan = PLANS[entry] = profiles.planned(notebook, PROFILE, variant=variant)
    COMMANDS[entry] = f"{shlex.quote(str(notebook))} --profile {PROFILE}" + (f" --variant {variant}" if variant else "")
    if plan["parameters"].get("save_as"):
        TRAINED[plan["parameters"]["save_as"]] = entry
    # a stamp without the figures it stands for is worth nothing
    manifest = runner.target(notebook, PROFILE, variant=variant) / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if any(made.get(key) != value for key, value in plan.items()):
        (STAMPS / f"{entry}.done").unlink(missing_ok=True)


def trained_before(wildcards):
    """The entry that trains the checkpoint which this one loads."""
    trained = TRAINED.get(PLANS[wildcards.entry]["parameters"].get("checkpoint"))
    return [str(STAMPS / f"{trained}.done")] if trained else []


rule all:
    input:
        expand(str(STAMPS / "{entry}.done"), entry=PLANS),
        local(str(gallery.page(PROFILE))),  # never in a cluster's object storage


localrules:
    all,
    page,


rule page:
    input:
        expand(str(STAMPS / "{entry}.done"), entry=PLANS),
    output:
        local(str(gallery.page(PROFILE))),
    run:
        gallery.write(PROFILE)


rule notebook:
    input:
        # the notebook is none: one whose outputs changed is the same, and its cells count through params.plan
        model=trained_before,
        library=sorted(str(p) for p in Path("srmcmc_lib").glob("*.py") if p.stem not in ("runner", "profiles", "gallery")),
        models=sorted(str(p) for p in Path("srmcmc_lib/pretrained").glob("*.*")),
    output:
        touch(str(STAMPS / "{entry}.done")),
    wildcard_constraints:
        entry="[^/]+",
    params:
        plan=lambda wildcards: json.dumps(PLANS[wildcards.entry], sort_keys=True),
        command=lambda wildcards: COMMANDS[wildcards.entry],
        python=sys.executable,
        timeout=config.get("cell_timeout", 60 * RESOURCES["runtime"]),
        env=ENV,
    threads: CORES
    resources:  # for a cluster; runs on this machine ignore them
        gpu=RESOURCES["gpu"],
        gpu_manufacturer="nvidia",  # Kubernetes wants to know
        mem_mb=RESOURCES["mem_mb"],
        runtime=RESOURCES["runtime"],
    shell:
        "env {params.env} {params.python:q} -m srmcmc_lib.runner {params.command} --cell-timeout {params.timeout}"


RETRAINED = Path("checkpoints/retrained")  # beside the shipped ones, not in their place
RECIPES = sorted(p.stem for p in Path("srmcmc_lib/pretrained").glob("*.yaml"))


rule checkpoints:
    input:
        expand(str(RETRAINED / "{model}.safetensors"), model=["fashion_mnist_classifier", *RECIPES]),


rule model:
    input:
        "srmcmc_lib/pretrained/{model}.yaml",
    output:
        str(RETRAINED / "{model}.safetensors"),
    wildcard_constraints:
        model="|".join(RECIPES),
    params:
        python=sys.executable,
        out=str(RETRAINED),
    resources:
        gpu=RESOURCES["gpu"],
        mem_mb=RESOURCES["mem_mb"],
        runtime=RESOURCES["runtime"],
    shell:  # one thread, as the shipped ones were learned; a stopped run goes on from checkpoints/<model>/
        "env OMP_NUM_THREADS=1 {params.python:q} -m srmcmc_lib.recipes {wildcards.model} --out {params.out:q}"


rule classifier:
    output:
        str(RETRAINED / "fashion_mnist_classifier.safetensors"),
    params:
        python=sys.executable,
        out=str(RETRAINED),
    shell:
        "env OMP_NUM_THREADS=1 {params.python:q} -m srmcmc_lib.classifier --out {params.out:q}"
