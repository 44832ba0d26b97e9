"""Writes a new plugin package for a trunk from the files in `lit_rl/templates`."""

from __future__ import annotations

import keyword
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

from lit_rl import registry
from lit_rl.errors import UserError

# Letters and digits in words joined by a single - or _; a letter first, so that it names a module too.
VALID_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
# Class names that the templates import for themselves.
TAKEN = {"Tensor", "TensorDict", "Trunk", "TrunkConformance"}


def write_plugin(name: str, parent: Path) -> Path:
    """Write the package ``lit-rl-NAME/`` under `parent` and return its folder.

    Raises:
        UserError: the name is invalid or registered already, the folder exists, or it cannot be written.
            Nothing is left behind.
    """
    words = re.split(r"[-_]", name)
    class_name = "".join(word[:1].upper() + word[1:] for word in words)
    if not VALID_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a trunk: use letters, digits and single - or _, with a letter first"
        )
    if class_name in TAKEN or keyword.iskeyword(class_name):
        raise UserError(
            f"{name!r} is no name for a trunk: its class {class_name} means something else already"
        )
    for entry in registry.entries():
        if registry.normalise(entry.name) == registry.normalise(name):
            raise UserError(f"{entry} is installed already; choose another name")

    words_for = {
        "name": name,
        "package": f"lit-rl-{'-'.join(words)}",
        "module": f"lit_rl_{'_'.join(words)}",
        "class_name": class_name,
    }
    try:
        version(words_for["package"])
    except PackageNotFoundError:
        pass
    else:
        raise UserError(
            f"the package {words_for['package']} is installed already, and this one would take its place; "
            "choose another name"
        )
    folder = parent / words_for["package"]
    contents = {
        "pyproject.toml": "pyproject.toml.tmpl",
        "README.md": "README.md.tmpl",
        f"{words_for['module']}.py": "module.py.tmpl",
        f"tests/test_{'_'.join(words)}.py": "test.py.tmpl",
    }
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"{folder} exists already; choose another name or --path") from None
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}; choose another --path") from error
    try:
        for path, template in contents.items():
            text = Template((files("lit_rl") / "templates" / template).read_text()).substitute(words_for)
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --path") from error
    return folder
