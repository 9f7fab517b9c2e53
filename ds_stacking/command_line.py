"""Options and recipes for every launcher, and how a launcher ends.

Exit codes: 0 done, 1 failed at run time, 2 bad input, 71 a rank, a device or the network was lost, 75 stopped and
saved, 130 interrupted before there was anything to save; 71 and 75 may be run again. Bad input and failures are one
sentence each; that of bad input is printed once, however many ranks met it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import time
import traceback
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TextIO, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ds_stacking.common import environment
from ds_stacking.common.environment import check_environment
from ds_stacking.common.errors import OtherRankFailed, RunAgain, UserError
from ds_stacking.common.failures import exit_code, explain, follows_a_loss, note_failure, take_option
from ds_stacking.common.json_files import read_settings
from ds_stacking.common.streams import keep_streams
from ds_stacking.common.words import nearest, plain
from ds_stacking.config import RENAMED, RunConfig
from ds_stacking.launcher_options import Options

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
"""Shipped recipes; `--recipe NAME` finds them by name."""
WAIT_FOR_RANK_0 = 15.0
"""Seconds that another rank waits before it prints bad input: rank 0 has most likely met and printed the same."""
LONGEST_END = 60.0
"""Seconds from an error to the end of its process, at most."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell's command: 128 + SIGINT."""
LONGEST_SENTENCE = 1200
"""Characters; a name that somebody gave may have any number of them."""
Config = TypeVar("Config")


def parse_run(arguments: Sequence[str], launcher: Iterable[str] = ()) -> RunConfig:
    """The run configuration that the command line describes; its options override the recipe. Raises UserError.

    `launcher` names options that a launcher has taken for itself: a misspelt one may have been meant.
    """
    parser = make_parser(RunConfig, "Pre-train BERT by progressive stacking on DeepSpeed ZeRO engines.", launcher)
    parser.add_argument("--recipe", action="append", help="a JSON file, or the name of a shipped recipe")
    parser.add_argument("--print_config", action="store_true", help="print the complete recipe, and train nothing")
    options = parser.parse_args(arguments)
    given = [*_read_recipe(options.recipe), *options.given]
    config = build(RunConfig, given)
    if options.print_config:
        print(json.dumps(build(RunConfig, given, make=_complete), indent=2))
        sys.exit(0)
    return config


def parse_options(
    config: type[Config], arguments: Sequence[str], description: str, renamed: Mapping[str, str] | None = None
) -> Config:
    """An instance of a configuration class, whose fields are the options. Raises UserError.

    `renamed` has the present names of options by those that they had once.
    """
    return build(config, make_parser(config, description, renamed=renamed).parse_args(arguments).given)


def make_parser(
    config: type, description: str, launcher: Iterable[str] = (), renamed: Mapping[str, str] | None = RENAMED
) -> Options:
    """A parser that gathers the fields of a configuration class in `given`: names and values, in order."""
    parser = Options(description, usage="%(prog)s [--OPTION VALUE ...]", renamed=renamed, others=launcher)
    parser.add_argument("--local_rank", "--local-rank", help=SUPPRESS)  # the deepspeed launcher puts it first
    parser.set_defaults(given=[])
    _add_fields(parser, config)
    return parser


def _add_fields(parser: Any, config: type, prefix: str = "") -> None:
    """An option for every field of a configuration class; fields of a nested class make a group."""
    documented = [docstring_parser.parse_from_object(kind).params for kind in reversed(config.__mro__[:-1])]
    texts = {param.arg_name: param.description or "" for params in documented for param in params}
    defaults = {field.name: _default(field) for field in fields(config)}
    for field, hint in get_type_hints(config).items():
        name, nested = prefix + field, is_dataclass(hint)
        needed = "needed" if defaults[field] is MISSING else f"default: {json.dumps(defaults[field], default=str)}"
        group = parser.add_argument_group(name, texts[field]) if nested else parser
        switch = {"nargs": "?", "const": (name, True)} if hint is bool else {}
        group.add_argument(
            f"--{name}",
            dest="given",
            action="append",
            type=partial(_named, name, hint),
            metavar=_metavar(field, hint),
            help="all of it as a JSON object" if nested else f"{texts[field]} ({needed})".replace("%", "%%"),
            **switch,
        )
        if nested:
            _add_fields(group, hint, f"{name}.")


def _metavar(field: str, hint: Any) -> str:
    choices = ("true", "false") if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
    return f"{{{','.join(choices)}}}" if choices else field.upper()


def field_types(config: type, prefix: str = "") -> dict[str, Any]:
    """Type of every option of a configuration class by its dotted name, those of nested classes included."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config).items():
        types[prefix + name] = hint
        if is_dataclass(hint):
            assert isinstance(hint, type)
            types |= field_types(hint, f"{prefix}{name}.")
    return types


def _named(name: str, hint: Any, text: str) -> tuple[str, Any]:
    """An option and what its text stands for: JSON, unless it is text that the option takes as it is."""
    kinds = {get_origin(part) or part for part in get_args(hint) or (hint,)}
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text.lower() if hint is bool else text)
        if str not in kinds or type(value) in kinds - {str}:
            return name, value
    for kind in (int, float):  # such as 007 and .5, which are no JSON
        with contextlib.suppress(ValueError):
            if kind in kinds and math.isfinite(kind(text)):
                return name, kind(text)
    return name, text


def _read_recipe(names: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Keys and values of the recipe that an option names."""
    if not names:
        return
    if len(names) > 1:
        raise UserError(f"--recipe is given {len(names)} times; give one recipe.")
    name = names[0]
    path = Path(name)
    if not path.is_file():
        shipped = sorted(path.stem for path in RECIPES.glob("*.json"))
        if name not in shipped:
            raise UserError(f"Recipe {name} is no file and no shipped recipe; {nearest(name, shipped)}")
        path = RECIPES / f"{name}.json"
    yield from read_settings(path, where=f"Recipe {path}").items()


def _instance(config: type[Config], values: dict[str, Any]) -> Config:
    return config(**values)


def _complete(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """All fields, as a recipe has them."""
    return {field.name: values.get(field.name, _default(field)) for field in fields(config)}


def _default(field: Field) -> Any:
    """What a recipe would say to have the default: of a list that has a notation, that."""
    return field.metadata.get("notation", field.default)


def build(
    config: type[Config], given: Iterable[tuple[str, Any]], where: str = "", *, make: Callable = _instance
) -> Any:
    """An instance of a configuration class from names and JSON values; of one given twice the last counts.

    `where` is its place in a recipe, with a dot. Raises UserError.
    """
    hints = get_type_hints(config)
    notations = {field.name: field.metadata.get("notation") for field in fields(config)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    groups: dict[str, list[tuple[str, Any]]] = {name: [] for name, hint in hints.items() if is_dataclass(hint)}
    for key, value in given:
        name, _, rest = key.partition(".")
        if key in RENAMED:
            raise UserError(f"{key} is now called {RENAMED[key]}.")
        if name not in hints or (rest and name not in groups):
            near = nearest(where + key, field_types(config, where), otherwise="--help lists all.")
            raise UserError(f"Unknown recipe key {where + key!r}; {near}")
        if name in groups and (rest or isinstance(value, dict)):
            groups[name] += [(rest, value)] if rest else value.items()
        elif notations[name] and isinstance(value, str):
            values[name] = value  # the class reads it
        else:
            values[name] = _checked(where + name, hints[name], value, make, notations[name])
    for name, pairs in groups.items():
        values[name] = build(hints[name], pairs, f"{where}{name}.", make=make)
    for field in fields(config):  # type: ignore[arg-type]
        if field.name not in values and field.default is field.default_factory is MISSING:
            raise UserError(f"{where or '--'}{field.name} is missing; give it.")
    return make(config, values)


def _checked(name: str, hint: Any, value: Any, make: Callable, notation: str | None = None) -> Any:
    """The value as the field's type. Raises UserError."""
    item = get_args(hint)[0] if get_origin(hint) is list else None
    if isinstance(value, list) and item is not None:
        return [_checked(f"{name}[{number}]", item, each, make) for number, each in enumerate(value)]
    if is_dataclass(hint) and isinstance(value, dict):
        assert isinstance(hint, type)
        return build(hint, value.items(), f"{name}.", make=make)
    if not is_dataclass(hint):
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(tuple(value) if isinstance(value, list) else value)
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            adapter.validate_python(json.loads(value))
            value = json.dumps(value)  # text: the quotation marks are the fault
    shown = str(value) if isinstance(value, str | float) else json.dumps(value)
    shown = shown if shown and shown.isprintable() else ascii(shown)
    text = f" or text such as {notation}" if notation else ""
    raise UserError(f"{name} is {plain(shown, 80)}; it must be {_describe(hint)}{text}.")


def _describe(hint: Any) -> str:
    """What a value of a type looks like."""
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if is_dataclass(hint):
        needed = [field.name for field in fields(hint) if field.default is field.default_factory is MISSING]
        return f"an object with {' and '.join(needed)}" if needed else "an object of its fields"
    if get_origin(hint) is list:
        return f"a list of {_describe(get_args(hint)[0]).replace('an object', 'objects')}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join(words.get(part) or _describe(part) for part in get_args(hint) or (hint,))


def run_main(main: Callable[[], None]) -> int:
    """Call a launcher's body and turn what it raises into an exit code, and into one sentence, not a traceback."""
    keep_streams()
    show = take_option(sys.argv)
    rank = _rank()
    try:
        check_environment()
        main()
    except RunAgain as stopped:
        if rank == 0:
            _say(str(stopped), sys.stdout)
        return RunAgain.exit_code
    except KeyboardInterrupt:
        _prepare_to_end(rank, None)
        if rank == 0:
            _say("error: interrupted; the same command starts again.", sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _fail(rank, error, show)
    return 0


def _fail(rank: int, error: Exception, show: bool) -> int:
    """Say what went wrong; the exit code."""
    _prepare_to_end(rank, error)
    if show:
        _say(traceback.format_exc().rstrip(), sys.stderr)
    sentence = plain(explain(error, rank), LONGEST_SENTENCE)
    if isinstance(error, UserError):
        if rank != 0:
            time.sleep(WAIT_FOR_RANK_0)
        _say(f"error: {sentence}", sys.stderr)
        return UserError.exit_code
    ends = f"rank {rank} ends: " if isinstance(error, OtherRankFailed) else ""
    _say(f"error: {ends}{sentence}", sys.stderr)
    return 1 if ends else exit_code(error)


def _rank() -> int:
    """This process's rank, before a launcher may make it the only one of its own; 0 where nothing tells."""
    try:
        return environment.rank()
    except UserError:
        return 0


def _prepare_to_end(rank: int, error: Exception | None) -> None:
    """Tell the batch script of a failure that would come again, and see to it that this process ends."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # libraries wait for lost partners at exit too; this timer is no Python thread
        faulthandler.dump_traceback_later(LONGEST_END, exit=True)
    if error is not None and not follows_a_loss(error):
        note_failure(rank, f"{type(error).__name__}: {error}")


def _say(text: str, stream: TextIO) -> None:
    """Print; whoever should read it may be gone, and the exit code must not change for that."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream, flush=True)
