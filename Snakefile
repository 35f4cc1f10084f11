# The graph behind `make figures`: one job a notebook listed in profiles/<profile>.yaml.
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)  # the library of this checkout, installed or not
from srmcmc_lib import profiles, runner

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
PLANS = {name: profiles.planned(NOTEBOOKS / f"{name}.ipynb", PROFILE) for name in profiles.read_profile(PROFILE)}
for name, plan in PLANS.items():  # a stamp without the figures it stands for is worth nothing
    manifest = runner.target(Path(name), PROFILE) / "manifest.json"
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if any(made.get(key) != value for key, value in plan.items()):
        (STAMPS / f"{name}.done").unlink(missing_ok=True)


rule all:
    input:
        expand(str(STAMPS / "{name}.done"), name=PLANS),


rule notebook:
    input:
        # ancient: a notebook whose outputs changed is the same notebook; its cells count, through params.plan
        notebook=ancient(str(NOTEBOOKS / "{name}.ipynb")),
        library=sorted(str(p) for p in Path("srmcmc_lib").glob("*.py") if p.name not in ("runner.py", "profiles.py")),
        models=sorted(str(p) for p in Path("srmcmc_lib/pretrained").glob("*.*")),
    output:
        touch(str(STAMPS / "{name}.done")),
    params:
        plan=lambda wildcards: json.dumps(PLANS[wildcards.name], sort_keys=True),
        python=sys.executable,
        profile=str(PROFILE),
        timeout=config.get("cell_timeout", 3600),
        env=ENV,
    threads: workflow.cores  # one notebook at a time
    shell:
        "env {params.env} {params.python:q} -m srmcmc_lib.runner {input.notebook:q} --profile {params.profile:q}"
        " --cell-timeout {params.timeout}"
