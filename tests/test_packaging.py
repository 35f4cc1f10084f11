"""pyproject.toml, requirements.lock and environment.yml agree."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_lock_has_every_requirement_within_its_range():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    wanted = PROJECT["project"]["dependencies"] + [r for extra in EXTRAS.values() for r in extra]
    for requirement in map(Requirement, wanted + PROJECT["tool"]["uv"]["constraint-dependencies"]):
        name = canonicalize_name(requirement.name)
        versions = [str(pin.specifier)[2:] for pin in pins if canonicalize_name(pin.name) == name]  # without ==
        assert versions and all(map(requirement.specifier.contains, versions)), requirement


def test_environment_and_continuous_integration_have_the_same_pythons_and_extras():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = conda["dependencies"]
    assert conda["name"] == PROJECT["project"]["name"]
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert SpecifierSet(python.removeprefix("python")) == supported
    assert pip["pip"] == ["-r requirements.lock", f"-e .[{','.join(sorted(EXTRAS))}]"]
    tests = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}" in supported] == tests["strategy"]["matrix"]["python"]
