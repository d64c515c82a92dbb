"""constraints.txt pins everything that `make setup` installs."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT


def requirements(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def reached(start: list[Requirement]) -> set[str]:
    """Names of the installed distributions that `start` asks for, directly or through others.

    A requirement with `==` is pinned by the package that asks for it (torch does so with CUDA's) and is not followed.
    """
    found, waiting = set(), list(start)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in found or str(requirement.specifier).startswith("=="):
            continue
        found.add((name, frozenset(requirement.extras)))
        extras = {"", *requirement.extras}
        for line in metadata.requires(name) or []:
            asked = Requirement(line)
            if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(asked)
    return {name for name, _ in found if not name.startswith(("cuda-", "nvidia-"))}  # torch with CUDA brings them


def test_every_package_that_the_setup_installs_is_pinned():
    pinned = {canonicalize_name(requirement.name) for requirement in requirements("constraints.txt")}
    needed = reached(requirements("requirements.txt") + requirements("requirements-dev.txt"))
    assert len(needed) > 40
    assert needed - pinned == set()


def test_every_pin_is_one_version():
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements("constraints.txt"))
