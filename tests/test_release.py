"""Contract: the version stands in one place, a wrong tag is found, the README's links work elsewhere, and the workflows name
what exists.

``make release-check`` builds a release and looks into it; these are its quick parts.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import neft_kernels
from tools import draw_kernel, release

REPOSITORY = Path(__file__).parent.parent
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def copy(tmp_path):
    """The files that a release is checked by."""
    (tmp_path / "neft_kernels").mkdir()
    for name in ("neft_kernels/__init__.py", "CHANGELOG.md", "CITATION.cff", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_version_stands_in_one_place():
    assert release.problems(None) == []
    assert release.version() == neft_kernels.__version__
    assert release.version() not in (REPOSITORY / "pyproject.toml").read_text()


def test_a_release_that_is_not_ready_is_found(copy):
    number = release.version()
    assert any("no date" in each for each in release.problems(f"v{number}", copy))
    change(copy / "CHANGELOG.md", "unreleased", "2030-01-31")
    assert release.problems(f"v{number}", copy) == []
    assert any("the tag is v9.9.9" in each for each in release.problems("v9.9.9", copy))
    change(copy / "neft_kernels/__init__.py", f'"{number}"', '"9.9.9"')
    assert any(f"is {number}, not 9.9.9" in each for each in release.problems("v9.9.9", copy))
    change(copy / "CITATION.cff", "authors:", "writers:")
    assert "CITATION.cff has no authors" in release.problems(None, copy)


def test_the_links_of_the_readme_become_absolute(copy):
    before = (REPOSITORY / "README.md").read_text()
    release.write_links("https://example.org/neft/", "v1.2.3", copy)
    readme = (copy / "README.md").read_text()
    targets = [target for _, _, target in release.LINK.findall(readme)]
    assert targets
    assert all(re.match("https://|#", target) for target in targets)
    assert "](https://example.org/neft/blob/v1.2.3/docs/contract.md)" in readme
    assert "](https://example.org/neft/raw/v1.2.3/benchmarks/results/cpu_forward.png)" in readme
    assert release.LINK.sub(r"[\2]", readme) == release.LINK.sub(r"[\2]", before)
    assert 'Repository = "https://example.org/neft"' in (copy / "pyproject.toml").read_text()


def test_the_release_tools_run_without_torch():
    """The workflows have none there."""
    program = "import sys; sys.modules['torch'] = None; import tools.release, tools.hub_kernel, tools.check_release"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_classifiers_name_the_versions_of_python():
    declared = (REPOSITORY / "pyproject.toml").read_text()
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", declared)]
    assert minors == list(range(10, 15))
    assert 'requires-python = ">=3.10"' in declared


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}  # a job asks for more where it needs it
    makefile = (REPOSITORY / "Makefile").read_text()
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step["run"] for step in steps if "run" in step)
    targets = re.findall(r"make (?:-s )?([a-z-]+)", commands)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    modules = re.findall(r"python -m (tools\.\w+)", commands)
    assert targets or modules
    assert all((REPOSITORY / f"{module.replace('.', '/')}.py").is_file() for module in modules)


def test_the_figure_of_the_kernel_has_the_numbers_of_the_reference():
    assert draw_kernel.FIGURE.read_text() == draw_kernel.draw()
