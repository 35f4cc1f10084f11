"""pyproject.toml, requirements.lock and environment.yml agree."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = {
    "Linux x86_64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "Linux aarch64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macOS arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def pins(python: str, machine: str) -> dict[str, Version]:
    """Package → the version that the lock installs there."""
    where = MACHINES[machine] | {"os_name": "posix", "python_version": python, "python_full_version": f"{python}.9"}
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==", line
            if pin.marker is None or pin.marker.evaluate(where | {"implementation_name": "cpython"}):
                assert canonicalize_name(pin.name) not in found, f"{line}: the package has two pins"
                found[canonicalize_name(pin.name)] = Version(exact.version)
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_every_requirement_within_its_range(python, machine):
    found, extras = pins(python, machine), [r for extra in EXTRAS.values() for r in extra]
    wanted = PROJECT["project"]["dependencies"] + extras + PROJECT["tool"]["uv"]["constraint-dependencies"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement
    cuda = [name for name in found if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    assert bool(cuda) == machine.startswith("Linux")


def test_environment_and_continuous_integration_have_the_same_pythons_and_extras():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = conda["dependencies"]
    assert conda["name"] == PROJECT["project"]["name"]
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    assert SpecifierSet(python.removeprefix("python")) == supported
    assert pip["pip"] == ["-r requirements.lock", f"-e .[{','.join(sorted(EXTRAS))}]"]
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = ci["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}" in supported] == tested == list(PYTHONS)
