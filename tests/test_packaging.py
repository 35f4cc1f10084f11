"""pyproject.toml, requirements.lock and environment.yml say the same."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from srmcmc_lib import paths

ROOT = paths.PACKAGE.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
ENVIRONMENT = (ROOT / "environment.yml").read_text()
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = {
    "Linux x86_64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "Linux aarch64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macOS arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def pins(lock: str, python: str, machine: str) -> dict[str, list[Version]]:
    """Package → versions that the lock installs there."""
    where = MACHINES[machine] | {"os_name": "posix", "python_version": python, "python_full_version": f"{python}.9"}
    found = {}
    for line in lock.splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==", line
            if pin.marker is None or pin.marker.evaluate(where | {"implementation_name": "cpython"}):
                found.setdefault(canonicalize_name(pin.name), []).append(Version(exact.version))
    return found


def lock_problems(pyproject: str, lock: str) -> list[str]:
    """Every direct requirement is pinned exactly once, and inside its range, on every Python and machine."""
    project = tomllib.loads(pyproject)
    extras = project["project"]["optional-dependencies"]
    constraints = project["tool"]["uv"]["constraint-dependencies"]
    wanted = [*project["project"]["dependencies"], *(r for extra in extras.values() for r in extra), *constraints]
    problems = []
    for python in PYTHONS:
        for machine in MACHINES:
            found = pins(lock, python, machine)
            problems += [f"{name} has {len(v)} pins on Python {python}" for name, v in found.items() if len(v) != 1]
            for requirement in map(Requirement, wanted):
                versions = found.get(canonicalize_name(requirement.name), [])
                if not versions or not all(requirement.specifier.contains(v) for v in versions):
                    problems.append(f"{requirement} is locked as {versions} for Python {python}, {machine}")
    return problems


def environment_problems(pyproject: str, environment: str) -> list[str]:
    """The conda environment has the project's Python range, the lock, and the project with all its extras."""
    project, conda = tomllib.loads(pyproject)["project"], yaml.safe_load(environment)
    python = [d for d in conda["dependencies"] if isinstance(d, str) and re.match(r"python\b", d)]
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    said = {
        "name": (conda["name"], project["name"]),
        "python": (
            [SpecifierSet(d.removeprefix("python")) for d in python],
            [SpecifierSet(project["requires-python"])],
        ),
        "pip": (pip, ["-r requirements.lock", f"-e .[{','.join(sorted(project['optional-dependencies']))}]"]),
    }
    return [f"{what}: environment.yml says {a}, pyproject.toml {b}" for what, (a, b) in said.items() if a != b]


def test_the_lock_fits_pyproject():
    assert lock_problems(PYPROJECT, LOCK) == []


def test_environment_yml_fits_pyproject():
    assert environment_problems(PYPROJECT, ENVIRONMENT) == []


def test_the_supported_pythons_are_those_tested():
    supported = SpecifierSet(tomllib.loads(PYPROJECT)["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}" in supported] == list(PYTHONS)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == list(PYTHONS)


@pytest.mark.parametrize("python", PYTHONS)
def test_no_cuda_on_a_mac(python):
    cuda = {n for n in pins(LOCK, python, "macOS arm64") if n.startswith(("nvidia-", "cuda-")) or n == "triton"}
    assert not cuda and "nvidia-cudnn-cu13" in pins(LOCK, python, "Linux x86_64")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (r'"scipy>=[\d.]+"', '"scipy>=99"', "scipy>=99"),
        (r'"pillow>=', '"pillowcase>=', "pillowcase"),
        (r'"pytest>=', '"pytest<5", "pytest>=', "pytest<5"),
        (r'"torch==[\d.]+"', '"torch==2.6.0"', "torch==2.6.0"),
    ],
)
def test_a_lock_that_drifted_is_noticed(old, new, says):
    changed = re.sub(old, new, PYPROJECT)
    assert changed != PYPROJECT and any(says in problem for problem in lock_problems(changed, LOCK))


@pytest.mark.parametrize(
    ("old", "new"),
    [("name: srmcmc", "name: other"), (",<3.14", ""), ("-r requirements.lock", "-r other.lock"), ("tensorboard,", "")],
)
def test_an_environment_that_drifted_is_noticed(old, new):
    assert old in ENVIRONMENT and len(environment_problems(PYPROJECT, ENVIRONMENT.replace(old, new))) == 1
