"""What the command line adds to jsonargparse: trunks by their entry-point names, refusals of its own."""

from __future__ import annotations

import json
import os
import pydoc
import re
import sys
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import Namespace, get_loader, set_loader

from lit_rl import registry
from lit_rl.errors import UserError, check_range
from lit_rl.messages import type_in_words

MODE = "lit_rl"  # the parser mode that reads YAML with trunk names

# Options that classes take from elsewhere in the configuration: class's option -> its source.
LINKED = {
    "model.env": "env",
    "data.env": "env",
    "data.seed": "seed_everything",
    "data.episodes": "episodes",
    "data.greedy": "greedy",
}

# Trainer options that these algorithms refuse: the value that leaves them alone, and why no other.
_STEPS = "is not for algorithms that step by themselves: set"
NOT_OF_THE_TRAINER = {
    "gradient_clip_val": (None, f"{_STEPS} model.max_grad_norm"),
    "accumulate_grad_batches": (1, f"{_STEPS} the size of the model's minibatches or batches"),
    "reload_dataloaders_every_n_epochs": (0, "would begin the environments anew each time: leave it out"),
}

_TRUNK_OPTION = re.compile(r"(--model\.(?:init_args\.)?trunk)(\.class_path|\.help)?(?:=(.*))?", re.DOTALL)


def resolve_trunk_name(name: str) -> str:
    """The class path of a trunk named by its entry point; `UserError` if unknown, ambiguous or broken."""
    registry.load(name)
    return registry.class_path(name)


def resolve_trunks(tree: Any) -> Any:
    """A configuration in which every ``trunk: NAME`` is the trunk's class path."""
    if not isinstance(tree, dict):
        return tree
    return {key: _resolved(value) if key == "trunk" else resolve_trunks(value) for key, value in tree.items()}


def _resolved(trunk: Any) -> Any:
    if isinstance(trunk, str):
        return {"class_path": resolve_trunk_name(trunk)}
    if isinstance(trunk, dict) and isinstance(trunk.get("class_path"), str):
        if not isinstance(trunk.get("init_args", {}), dict):
            raise UserError(f"trunk.init_args takes options with their values, not {trunk['init_args']}")
        return {**trunk, "class_path": resolve_trunk_name(trunk["class_path"])}
    return trunk


def resolve_options(argv: list[str]) -> list[str]:
    """Command-line options in which every trunk is named by its class path."""
    resolved: list[str] = []
    rest = iter(argv)
    for option in rest:
        refuse_linked(option.partition("=")[0].removeprefix("--").replace(".init_args", ""))
        match = _TRUNK_OPTION.fullmatch(option)
        if match is None:
            resolved.append(option)
            continue
        key, suffix, value = match.group(1), match.group(2) or "", match.group(3)
        if value is None:
            value = next(rest, None)
        if value is None or value.startswith("--"):
            resolved += [key + suffix] if value is None else [key + suffix, value]
        elif suffix == ".help":
            resolved.append(f"{key}.help={resolve_trunk_name(value)}")
        else:
            if not value.strip():
                raise UserError("model.trunk is empty: lit-rl trunks list names those there are")
            chosen = _resolved(yaml.safe_load(value))
            # First none: or the new trunk would keep options of the one it replaces.
            resolved += [f"{key}=null", f"{key}={json.dumps(chosen)}"]
    return resolved


def long_options(argv: list[str]) -> list[str]:
    """Options with ``--config`` in the place of Lightning's ``-c``."""
    return ["--config" if option == "-c" else re.sub("^-c=?", "--config=", option) for option in argv]


def pairs(options: list[str]) -> list[tuple[str, str]]:
    """``--key value`` and ``--key=value`` as pairs."""
    return [
        (option.partition("=")[0], option.partition("=")[2] if "=" in option else value)
        for option, value in zip_longest(options, options[1:], fillvalue="")
        if option.startswith("--")
    ]


def chosen_classes(argv: list[str], otherwise: Mapping[str, type]) -> dict[str, str]:
    """The class path that options and configurations name last for each section.

    What a section is by default must be what it is in the end: the parser keeps the values of one class's
    options, defaults too, for the class that takes its place.

    Args:
        argv: options.
        otherwise: by section, the class of one that nothing names.
    """
    chosen = {
        section: f"{default.__module__}.{default.__qualname__}" for section, default in otherwise.items()
    }
    for key, value in pairs(argv):
        named = _classes_in(_tree(value)) if key == "--config" else {}
        for section in otherwise:
            if key in (f"--{section}", f"--{section}.class_path"):
                named = _classes_in({section: _tree(value)})
            known = sys.modules[otherwise[section].__module__.rpartition(".")[0]]
            found = pydoc.locate(named.get(section, "")) or getattr(known, named.get(section, ""), None)
            if isinstance(found, type):  # the parser complains of whatever else is named
                chosen[section] = f"{found.__module__}.{found.__qualname__}"
    return chosen


def _tree(config: str) -> Any:
    """What a file or a text holds; None if it is not to be read."""
    try:
        return yaml.safe_load(Path(config).read_text() if Path(config).is_file() else config)
    except (OSError, ValueError, yaml.YAMLError):  # said by the parser
        return None


def _classes_in(tree: Any) -> dict[str, str]:
    """The class path that a configuration names for each section."""
    sections = tree.items() if isinstance(tree, dict) else ()
    named = {key: part.get("class_path") if isinstance(part, dict) else part for key, part in sections}
    return {key: name for key, name in named.items() if isinstance(name, str)}


def _load(text: str) -> Any:
    tree = get_loader("yaml")(text)
    for section in ("model", "data"):
        given = tree.get(section) if isinstance(tree, dict) else None
        options = given.get("init_args") if isinstance(given, dict) else None
        for name in options if isinstance(options, dict) else ():
            refuse_linked(f"{section}.{name}")
    return resolve_trunks(tree)


set_loader(MODE, _load, exceptions=(yaml.YAMLError,))


# ---------------------------------------------------------------------- refusals


def refuse_linked(option: str) -> None:
    """Raises `UserError` for an option that would be overwritten without a word."""
    for target, source in LINKED.items():
        if option == target or option.startswith(f"{target}."):
            raise UserError(
                f"{option} is taken from {source}: set {option.replace(target, source, 1)} instead"
            )


def check_options(options: Namespace, signatures: dict[str, Callable]) -> None:
    """Raises `UserError` for values that jsonargparse lets pass and nothing could take.

    Args:
        options: what was parsed.
        signatures: a callable for each section of options, whose parameters have its types.
    """
    model = options.model.init_args
    trunk = model.get("trunk")
    sections = [
        *((section, takes, options[section]) for section, takes in signatures.items()),
        ("model", pydoc.locate(options.model.class_path), model),
        ("data", pydoc.locate(options.data.class_path), options.data.init_args),
        *(
            [("model.trunk", pydoc.locate(trunk.class_path), trunk.get("init_args", Namespace()))]
            if trunk
            else ()
        ),
    ]
    for where, takes, given in sections:
        if not isinstance(given, Namespace):
            raise UserError(
                f"{where} takes options with their values, not {'null' if given is None else given}"
            )
        _refuse_nulls(where, takes, given)
    for name, (unset, why_not) in NOT_OF_THE_TRAINER.items():
        if options.trainer[name] not in (None, unset):
            raise UserError(f"trainer.{name} {why_not}")
    for option in ("name", "seed_everything", "episodes", "greedy", "torch_threads"):
        if options[option] is None:
            raise UserError(f"{option} is null: give a value, or leave it out")
    check_range({"episodes": options.episodes, "torch_threads": options.torch_threads}, 1, 2**31 - 1)
    check_range({"seed_everything": options.seed_everything}, 0, 2**31 - 1)
    parts = Path(options.name).parts
    if not parts:
        raise UserError("name is empty: give the name of a folder in logs/")
    if Path(options.name).is_absolute() or ".." in parts:
        raise UserError(f"name {options.name!r} leads out of logs/: give the name of a folder in it")
    if "\0" in options.name or any(len(os.fsencode(part)) > 255 for part in parts):
        raise UserError(f"name {options.name[:40]!r} ... cannot be that of a folder: choose another")


def _refuse_nulls(where: str, takes: Callable, given: Namespace) -> None:
    try:  # a dataclass and a constructor alike
        hints = get_type_hints(takes) | get_type_hints(getattr(takes, "__init__", takes))
    except NameError:  # of what only type checkers import
        return
    for name, hint in hints.items():
        if name in given and given[name] is None and hint is not Any and NoneType not in get_args(hint):
            raise UserError(
                f"{where}.{name} takes {type_in_words(str(hint))}, not null: give a value, or leave it out"
            )


def check_folder(folder: Path, *, new: bool = False) -> None:
    """Raises `UserError` where a folder can neither be used nor made, or should be `new` and is not empty."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write to {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {there} is write-protected")
    if new and there == folder and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder")
