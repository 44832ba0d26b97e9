"""What the command line adds to jsonargparse: trunks by their entry-point names, errors in one line."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lit_rl import registry

MODE = "lit_rl"  # the parser mode that reads YAML with trunk names

_TRUNK_OPTION = re.compile(r"(--model\.(?:init_args\.)?trunk)(\.class_path|\.help)?(?:=(.*))?", re.DOTALL)


def resolve_trunk_name(name: str) -> str:
    """The class path of a trunk named by its entry point; `UserError` if unknown, ambiguous or broken."""
    if "." not in name:
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
        return {**trunk, "class_path": resolve_trunk_name(trunk["class_path"])}
    return trunk


def resolve_options(argv: list[str]) -> list[str]:
    """Command-line options in which every trunk is named by its class path."""
    resolved: list[str] = []
    rest = iter(argv)
    for option in rest:
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
            chosen = _resolved(yaml.safe_load(value))
            # First none: or the new trunk would keep options of the one it replaces.
            resolved += [f"{key}=null", f"{key}={json.dumps(chosen)}"]
    return resolved


def _load(text: str) -> Any:
    return resolve_trunks(get_loader("yaml")(text))


set_loader(MODE, _load, exceptions=(yaml.YAMLError,))


def one_line(message: str) -> str:
    """The culprit and the cause of a jsonargparse message, which spans many lines and repeats itself."""
    keys = re.findall(r'[Kk]ey "([\w.]+)"', message)
    where = ".".join(dict.fromkeys(key for key in keys if key != "init_args"))
    text = " ".join(message.split())
    causes = (
        (r"Option '([\w.]+)' is not accepted", "{where} has no option {0}"),
        (r"Group '([\w.]+)' does not accept option '([\w.]+)'", "{0} has no option {1}"),
        (r"[Uu]nrecognized arguments: (--)?(\S+)", "there is no option {1}"),
        (r"Expected an? <class '(?:\w+\.)*(\w+)'>\. Got value: (\S+)", "{where} takes {0}, not {1}"),
        (r"a function or a callable class: (.{1,200}?)(?: - Expected|\. Got value|$)", "{where}: {0}"),
    )
    for pattern, form in causes:
        match = re.search(pattern, text)
        if match:
            groups = [group or "" for group in match.groups()]
            return form.format(*groups, where=where or "the configuration")
    return text if len(text) <= 300 else f"{where + ': ' if where else ''}{text[:280]} ..."
