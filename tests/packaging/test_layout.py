"""The folders on disk are what the wheel, the type checkers and other people's machines are told they are."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TOPS = ("server", "kernels", "draftmodels", "clients")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_folders() -> list[Path]:
    """Folders that hold Python modules, relative to the root."""
    modules = (path for top in TOPS for path in (ROOT / top).rglob("*.py"))
    return sorted({path.parent.relative_to(ROOT) for path in modules})


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: what would be committed is unknown")
    paths = (ROOT / name for name in listing.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_packages_in_pyproject_are_the_folders_on_disk() -> None:
    on_disk = [".".join(("paceline", *folder.parts)) for folder in package_folders()]
    assert on_disk, "found no packages at all"
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == on_disk


def test_constraints_pin_a_fitting_version_of_every_requirement() -> None:
    project = pyproject()["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [
        version for version in pins.values() if "+" in version
    ]  # only some indexes have local versions
    groups = project["optional-dependencies"].values()
    for line in (*project["dependencies"], *(line for group in groups for line in group)):
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # an extra that includes another
            continue
        assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier


def test_every_top_folder_with_modules_is_mapped_into_the_umbrella_package() -> None:
    tops = {folder.parts[0] for folder in package_folders()}
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"paceline.{top}": top for top in tops}


def test_top_folders_have_no_init_and_every_folder_below_has_one() -> None:
    with_init = {folder for folder in package_folders() if (ROOT / folder / "__init__.py").exists()}
    assert with_init == {folder for folder in package_folders() if len(folder.parts) > 1}


def test_no_init_under_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("top", TOPS)
def test_type_checkers_reach_each_top_folder_through_a_symlink(top: str) -> None:
    link = ROOT / ".typing" / "paceline" / top
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{top}"
    assert link.is_dir()


def test_no_path_of_a_developers_machine_is_committed() -> None:
    # Written in pieces, or this file would be the first hit.
    pattern = re.compile(
        "|".join(
            ("/wo" + r"rk/\w", "/tmp/mo" + "dels", "/tmp/ve" + "nv", "/ho" + r"me/\w", "/Us" + r"ers/\w")
        )
    )
    hits = []
    for path in tracked_files():
        for number, line in enumerate(
            path.read_bytes().decode("utf-8", errors="replace").splitlines(), start=1
        ):
            if pattern.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not hits


def test_files_stay_small_enough_to_read() -> None:
    """The house limit is about 300 lines; 400 is where a file certainly has two owners."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in tracked_files()
        if path.suffix == ".py" and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
