"""Settings from YAML files and the command line.

One YAML file describes one experiment, both stages of it. Unknown keys, values of another type
and contradictions are refused before anything is read or written.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from spectralx.cli import InputError, one_of
from spectralx.settings import Settings

CONFIG_FOLDER = Path(__file__).parent / "configs"

T = TypeVar("T")


def _build(kind: type[T], values: Mapping[str, Any]) -> T:
    """A (nested) dataclass from checked values; missing keys keep their defaults."""
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        elif get_origin(hint) is tuple:
            value = tuple(value)  # YAML and JSON know lists only
        arguments[key] = value
    return kind(**arguments)


def _check_keys(values: object, kind: type, where: str, path: str = "") -> None:
    """Every key of `values` is a field of `kind`, at every level."""
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else repr(values)
        raise InputError(f"{where}: found {found} as {path or 'the whole'}; expected keys")
    hints = get_type_hints(kind)
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            close = one_of(str(key), hints)  # YAML's keys may be numbers and booleans too
            raise InputError(f"{where}: found unknown key {name}; expected {close}")
        if dataclasses.is_dataclass(hints[key]):
            assert isinstance(hints[key], type)
            _check_keys(value, hints[key], where, name)


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(name: str | os.PathLike[str]) -> Path:
    """The file `name`, or else the packaged configuration of that name."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = CONFIG_FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path(".") and packaged.is_file():
        return packaged
    raise InputError(
        f"{name}: no such configuration; expected a YAML file, or packaged "
        + one_of(path.stem, packaged_configs())
    )


def _check_config(path: Path) -> None:
    """Keys and types of a configuration file, so that a mistake is reported with its name."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: found YAML nested too deeply; expected settings") from error
    _check_keys(values, Settings, str(path))
    parse(make_parser("spectralx"), ["--config", str(path)], str(path))


def make_parser(program: str) -> ArgumentParser:
    """Parser of the options of an experiment: ``--config`` and one option a setting."""
    parser = ArgumentParser(prog=program, exit_on_error=False, description=None, allow_abbrev=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file, or the name of a packaged one"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_class_arguments(Settings, None)
    return parser


def add_fresh(parser: ArgumentParser) -> None:
    """The option of commands that train: not to go on from an earlier run."""
    parser.add_argument(
        "--fresh", action="store_true", help="forget what an earlier run left in its folder"
    )


def _option_names(parser: ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings if "--" in name]


def parse(parser: ArgumentParser, argv: Sequence[str], where: str = "") -> dict[str, Any]:
    """Parsed arguments; the parser's complaints become one line of found and expected.

    Parameters
    ----------
    parser : made with ``exit_on_error=False``.
    argv : arguments.
    where : file they come from, to be named.

    Raises
    ------
    InputError : unknown option or key, or a value that does not fit.
    """
    try:
        parsed: dict[str, Any] = parser.parse_args(list(argv)).as_dict()
    except ArgumentError as error:
        message = " ".join(str(error.message).split())
        value = re.fullmatch(r'Parser key "(.+?)": Expected an? (.+)\. Got value: (.*)', message)
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        if value is not None:
            expected = re.sub(r"<class '(.+?)'>|typing\.", r"\1", value[2])
            message = f"{value[1]}: found {value[3]}; expected {expected}"
        elif unknown is not None:
            option = unknown[1].partition("=")[0]
            close = one_of(option, _option_names(parser))
            message = f"found unknown option {option}; expected {close}"
        raise InputError(f"{where}: {message}" if where else message) from error
    return parsed


def parse_settings(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    """Settings from the command line; configurations apply first, options override them.

    Returns
    -------
    The settings, and the parser's other arguments.

    Raises
    ------
    InputError : unknown option or key, or a value that does not fit; one line.
    """
    configs: list[str] = []
    options: list[str] = []
    pending = iter(argv)
    for argument in pending:
        if argument == "--config":
            name = next(pending, None)
            if name is None:
                raise InputError("--config: found nothing; expected a file or a packaged name")
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
        else:
            options.append(argument)
            continue
        path = find_config(name)
        _check_config(path)
        configs += ["--config", str(path)]
    parsed = parse(parser, configs + options)
    own = {field.name for field in dataclasses.fields(Settings)}
    settings = _build(Settings, {key: value for key, value in parsed.items() if key in own})
    return settings, {key: value for key, value in parsed.items() if key not in own}


def load_settings(
    config: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Settings of a YAML file or packaged configuration, in a program.

    Parameters
    ----------
    config : file or packaged name; None for the defaults.
    overrides : as on the command line, e.g. ``["--data.root=DIR", "--stage1.run.steps=100"]``.
    """
    argv = [*([] if config is None else ["--config", os.fspath(config)]), *overrides]
    return parse_settings(make_parser("spectralx"), argv)[0]


def settings_from_dict(values: Mapping[str, Any], where: str) -> Settings:
    """Settings that `Settings.as_dict` gave, e.g. those in the checkpoint `where`."""
    _check_keys(values, Settings, where)
    return _build(Settings, values)
