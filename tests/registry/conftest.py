"""Plugin packages installed for real, by pip, into folders that only a subprocess sees."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "fixtures" / "packages"


@pytest.fixture(scope="session")
def install(run_python):
    """Installs source folders into the folder `into`; nothing is fetched."""

    def run_pip(*sources, into):
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", into]
        done = run_python("-m", "pip", "install", *options, *sources)
        assert done.returncode == 0, done.stderr

    return run_pip


@pytest.fixture(scope="session")
def broken_and_clashing(tmp_path_factory, install):
    """A folder with the broken and the clashing package installed in it."""
    root = tmp_path_factory.mktemp("packages")
    # Copied first: building leaves its traces beside the sources.
    sources = [shutil.copytree(PACKAGES / name, root / name) for name in ("broken", "clashing")]
    install(*sources, into=root / "site")
    return root / "site"


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code with `site` on its path and returns the finished process."""

    def run(*arguments, site=None, cwd=None):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(site)} if site else {})
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)

    return run
