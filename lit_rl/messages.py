"""The messages of argparse and of jsonargparse, which span many lines, as one line each."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any, NoReturn

from lit_rl.errors import UserError

# Sections whose class a message does not name.
SECTIONS = {"env": "lit_rl.envs.EnvConfig", "trainer": "lightning.Trainer"}
# Classes that may be named without their path.
CLASSES = {
    "model": "LitPPO or LitDQN",
    "data": "RolloutDataModule or ReplayDataModule",
    "model.head": "ExpectedQ, CategoricalQ or QuantileQ",
}
# Options that a class has and no command takes: other sections say what they are.
GIVEN = ("env", "in_features", "features", "num_actions", "seed", "episodes", "greedy")

_UNKNOWN = re.compile(
    r"(?:[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'|"
    r"unrecognized arguments: (?:--)?([^\s=]+))"
)
_VALUE = r"(?:.(?!Subtypes: ))*?Given value: ?(.*?)(?: - Expected .*| Given value.*)?$"  # the innermost
# What a jsonargparse message may say and how it is said here; the first that matches counts.
_CAUSES = [
    (re.compile(pattern), form)
    for pattern, form in (
        (
            r"()got NestedArg\(key='([\w.]+)'",
            "{where}: name the class first, --{where} NAME --{where}.{value} ...",
        ),
        (
            r"Expected an? (<class '[\w.]+'>|typing\.Literal\[[^\]]*\])\. Got value: ?(.*?)"
            r"(?:\.? (?:Got value|Given value|- Expected).*)?$",
            "{where} takes {type}, not {value}",
        ),
        (
            r"Expected (a) dot import path string: (\S+)",
            "{where}: there is no class {value}: {classes}",
        ),
        (r"Import path (\S+) does not correspond to a subclass of (\S+)", "{where}: {type} is no {value}"),
        (r"()a function or a callable class: (.+?)(?:\. Got value| - Expected|$)", "{where}: {value}"),
        (r"Subtypes: \[((?:.(?!Subtypes: ))*?)\] Errors: " + _VALUE, "{where} takes {type}, not {value}"),
        (r"^()(?:Parser key \"[\w.]+\": )+(.*)", "{where}: {value}"),
    )
]


def one_line(message: str, configs: str = "") -> str:
    """The culprit and the cause; `configs` are the files that a faulty configuration came from."""
    text = " ".join(message.split())
    keys = [key for key in re.findall(r'Parser key "([\w.]+)"', text) if key != "init_args"]
    where = ".".join(dict.fromkeys(re.findall(r"Group '([\w.]+)' does not", text) or keys))
    if unknown := _UNKNOWN.search(text):
        return _unknown_option(f"{where}.{''.join(filter(None, unknown.groups()))}".lstrip("."), text)
    for pattern, form in _CAUSES:
        if match := pattern.search(text):
            kind, value = match.groups()
            value = {"None": "null", "": "''"}.get(value, value)
            choose = f"choose {CLASSES[where]}, or " if where in CLASSES else ""
            return form.format(
                where=where or "the configuration",
                type=type_in_words(kind),
                value=_cut(value, 100),
                classes=f"{choose}give the full path of a class",
            )
    text = text.replace("Problems parsing config: ", f"{configs} is no valid YAML: ").replace(
        ' in "<unicode string>"', ""
    )
    text = re.sub("^Unexpected config:", f"{configs} does not hold options with their values:", text)
    return _cut(text, 300)


def _unknown_option(option: str, text: str) -> str:
    """Says that there is no such option, and which ones are like it."""
    section, _, name = option.rpartition(".")
    paths = re.findall(r"class_path[= ]'([\w.]+)'", text)
    owner = pydoc.locate(SECTIONS.get(section) or (paths[-1] if paths else ""))
    known = _options_of(owner) if callable(owner) else []
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"there is no option {option}, did you mean {' or '.join(close)}?"
    return f"there is no option {option}" + (f", but {', '.join(known)}" if 0 < len(known) < 8 else "")


def _options_of(owner: Callable[..., Any]) -> list[str]:
    """A callable's options; of a class that passes further ones on, those of its base, too."""
    names: dict[str, None] = {}
    for takes in owner.__mro__ if isinstance(owner, type) else (owner,):
        parameters = inspect.signature(takes).parameters.values()
        named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        names |= dict.fromkeys(name for name in named if name not in GIVEN)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def type_in_words(text: str) -> str:
    """A type as jsonargparse writes it, in plain words."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"\1", text)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", text)
    return text.replace("'", "").replace("NoneType", "null").replace(", ", " or ")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."


class CommandParser(argparse.ArgumentParser):
    """Raises `UserError` for what it cannot parse."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
