"""Options and recipes for every launcher, and how a launcher ends.

Exit codes: 0 done, 1 failed at run time, 2 bad input, 71 a rank, a device or the network was lost, 75 stopped and
saved, 130 interrupted before there was anything to save; 71 and 75 may be run again. Bad input and failures are one
sentence each; that of bad input is printed once, however many ranks met it.
"""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import json
import os
import re
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TextIO, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_dumper, set_parsing_settings

from ds_stacking.common import environment
from ds_stacking.common.environment import check_environment
from ds_stacking.common.errors import OtherRankFailed, RunAgain, UserError
from ds_stacking.common.explain import EPILOG, explain, take_option
from ds_stacking.common.failures import exit_code, follows_a_loss, note_failure
from ds_stacking.common.json_files import keys_once
from ds_stacking.common.own_files import read_named
from ds_stacking.common.streams import keep_streams
from ds_stacking.common.words import plain
from ds_stacking.config import QUICKSTART_STAGES, RunConfig, StageConfig

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
"""Shipped recipes; `--recipe NAME` finds them by name."""
WAIT_FOR_RANK_0 = 15.0
"""Seconds that another rank waits before it prints bad input: rank 0 has most likely met and printed the same."""
LONGEST_END = 60.0
"""Seconds from an error to the end of its process, at most."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell's command: 128 + SIGINT."""
LARGEST_RECIPE = 1 << 20
"""Bytes."""
LONGEST_SENTENCE = 1200
"""Characters; a name that somebody gave may have any number of them."""
MOST_BRACKETS = 1000
"""Of a value on the command line, which would exhaust a parser's stack where they are nested."""
Options = TypeVar("Options")


def make_parser() -> ArgumentParser:
    """The parser of a pre-training run: a recipe file, and every field of RunConfig as an option that overrides it."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_dumper("json", lambda values: json.dumps(values, indent=2) + "\n")  # --print_config for people
    parser = ArgumentParser(
        prog="pretrain.py",
        description="Pre-train BERT by progressive stacking on DeepSpeed ZeRO engines. No options: the quickstart.",
        epilog=EPILOG,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="json",
    )
    parser.add_argument("--recipe", action="config", help="recipe: a JSON file, or the name of a shipped one")
    text = "stages as LAYERS:STEPS,LAYERS:STEPS,... or as a JSON list of objects"
    parser.add_argument("--stages", type=Any, default=QUICKSTART_STAGES, help=text)
    parser.add_class_arguments(RunConfig, nested_key=None, skip={"stages"})
    # jsonargparse takes defaults from a built ModelConfig, in which the 0 is resolved for the default width.
    parser.set_defaults({"model.intermediate_size": 0})
    return parser


def parse_run(arguments: Sequence[str], launcher: Iterable[str] = ()) -> RunConfig:
    """The run configuration that the command line describes; its options override the recipe. Raises UserError.

    `launcher` names options that a launcher has taken for itself: a misspelt one may have been meant.
    """
    recipe, options = _split(arguments)
    if recipe is not None:
        _check_recipe(recipe)
        options = ["--recipe", recipe, *options]  # first, since a later argument overrides an earlier one
    parser = make_parser()
    known = field_types(RunConfig)
    try:
        parsed = parser.parse_args(options)
        stages = _stages(parsed["stages"])
        _refuse_nulls(known, parsed)
        built = vars(parser.instantiate(parsed))
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), known | dict.fromkeys(launcher, str))) from None
    return RunConfig(**{**{field.name: built[field.name] for field in fields(RunConfig)}, "stages": stages})


def parse_options(config: type[Options], arguments: Sequence[str], description: str) -> Options:
    """An instance of a configuration class, whose fields are the options. Raises UserError."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description, epilog=EPILOG, exit_on_error=False, allow_abbrev=False, parser_mode="json"
    )
    parser.add_class_arguments(config, nested_key=None)
    known = field_types(config)
    options = _complete_switches(_own(arguments), known)
    try:
        parsed = parser.parse_args(options)
        _refuse_nulls(known, parsed)
        return config(**vars(parser.instantiate(parsed)))
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        if missing := re.search(r"arguments are required: (\w+)", str(error)):
            raise UserError(f"--{missing[1]} is missing; give it.") from None
        raise UserError(_explain(str(error), known)) from None


def field_types(config: type, prefix: str = "") -> dict[str, Any]:
    """Type of every option of a configuration class by its dotted name, those of nested classes included."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config).items():
        types[prefix + name] = hint
        if is_dataclass(hint):
            assert isinstance(hint, type)
            types |= field_types(hint, f"{prefix}{name}.")
    return types


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe's file and all other options, switches such as --overwrite completed, the launcher's own removed."""
    recipes, options = [], []
    rest = _own(arguments)
    while rest:
        option, *rest = rest
        if option.startswith("--recipe="):
            recipes.append(option.removeprefix("--recipe="))
        elif option == "--recipe" and rest:
            recipes.append(rest.pop(0))
        else:
            options.append(option)
    if len(recipes) > 1:
        raise UserError(f"--recipe is given {len(recipes)} times; give one recipe.")
    return (_recipe_file(recipes[0]) if recipes else None), _complete_switches(options, field_types(RunConfig))


def _own(arguments: Sequence[str]) -> list[str]:
    """The arguments without what the deepspeed launcher puts before them. Raises UserError for JSON without an end."""
    for argument in arguments:
        if max(map(argument.count, "[{")) > MOST_BRACKETS:
            raise UserError(f"{argument.partition('=')[0][:80]} has more than {MOST_BRACKETS} brackets; shorten it.")
    return [argument for argument in arguments if not re.fullmatch(r"--local[_-]rank=\d+", argument)]


def _complete_switches(options: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The options with `=true` after those of type bool that stand without a value."""
    switches = {f"--{name}" for name, hint in known.items() if hint is bool}
    following = [*options, "--"][1:]
    return [
        f"{option}=true" if option in switches and after.startswith("--") else option
        for option, after in zip(options, following, strict=True)
    ]


def _recipe_file(name: str) -> str:
    if Path(name).is_file():
        return name
    shipped = sorted(path.stem for path in RECIPES.glob("*.json"))
    if name not in shipped:
        near = _nearest(name, shipped) or f"; shipped are {', '.join(shipped)}."
        raise UserError(f"Recipe {name} is no file and no shipped recipe{near}")
    return str(RECIPES / f"{name}.json")


def _check_recipe(path: str) -> None:
    """Raise UserError for a recipe that cannot be read, is no JSON object or has a key that no option has."""
    try:
        text = read_named(Path(path), limit=LARGEST_RECIPE).decode()
        once = partial(keys_once, f"Recipe {path}")
        recipe = json.loads(text, parse_constant=_no_number, parse_int=_whole_number, object_pairs_hook=once)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"Recipe {path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise UserError(f"Recipe {path} is nested too deeply; a recipe has two levels, and stages.") from None
    except ValueError as error:  # no JSON, or bytes that are no text
        raise UserError(f"Recipe {path} is no JSON: {error}.") from None
    if not isinstance(recipe, dict):
        raise UserError(f'Recipe {path} must be a JSON object, such as {{"lr": 0.001}}.')
    known = field_types(RunConfig)
    for key, value in recipe.items():
        _check_key(key, known)
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(_wrong_type(key, known[key], value))
            for inner in value:
                _check_key(f"{key}.{inner}", known)


def _no_number(constant: str) -> None:
    """Refuse what Python's parser takes for JSON: NaN, Infinity and -Infinity."""
    raise ValueError(f"{constant} is no number")


def _whole_number(digits: str) -> int:
    """Refuse numbers that no setting needs and no sentence should repeat."""
    if len(digits) > 20:
        raise ValueError(f"{digits[:20]}... has {len(digits)} digits, and no setting more than 20")
    return int(digits)


def _stages(given: Any) -> str | list[StageConfig]:
    """The stages, objects of a JSON list turned into StageConfig; text is left to RunConfig."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise UserError(
            f"stages is {json.dumps(given)}; it must be text such as 3:50000,6:70000 or a list of objects."
        )
    return [_stage(number, stage) for number, stage in enumerate(given)]


def _stage(number: int, stage: Any) -> StageConfig:
    known = field_types(StageConfig)
    where = f"stages[{number}]"
    if not isinstance(stage, dict):
        raise UserError(f'{where} is {stage!r}; it must be an object such as {{"layers": 3, "steps": 50000}}.')
    for key in stage:
        _check_key(key, known, f"{where}.")
    for field in fields(StageConfig):
        if field.default is MISSING and stage.get(field.name) is None:
            raise UserError(f"{where} has no {field.name}; give it layers and steps.")
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")
    parser.add_class_arguments(StageConfig, nested_key=None)
    try:
        values = parser.parse_object(stage)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), known, f"{where}.")) from None
    _refuse_nulls(known, values, f"{where}.")
    return StageConfig(**vars(values))


def _refuse_nulls(known: Mapping[str, Any], values: Namespace, where: str = "") -> None:
    """Raise UserError for a null where the field must have a value: jsonargparse takes it for "not given"."""
    for name, hint in known.items():
        if values[name] is None and NoneType not in get_args(hint):
            raise UserError(_wrong_type(where + name, hint, None))


def _check_key(key: str, known: Iterable[str], where: str = "") -> None:
    if key not in known:
        near = _nearest(key, known) or "; --help lists all."
        raise UserError(f"Unknown option or recipe key {where + key!r}{near}")


def _nearest(unknown: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the nearest known name, in full or by its last part; empty if none is near."""
    whole = {name: name for name in known}
    last = {name.rpartition(".")[2]: name for name in known}
    for names, cutoff in ((whole, 0.6), (last, 0.8)):
        if near := difflib.get_close_matches(unknown, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[near[0]]!r}?"
    return ""


def _wrong_type(name: str, hint: Any, value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = ascii(shown) if not shown.isprintable() else shown
    return f"{name} is {shown if len(shown) <= 80 else f'{shown[:80]}...'}; it must be {_describe(hint)}."


def _describe(hint: Any) -> str:
    """What a value of a type looks like."""
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if is_dataclass(hint):
        return "an object of its fields"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join(words.get(part) or _describe(part) for part in get_args(hint) or (hint,))


def _explain(message: str, known: Mapping[str, Any], where: str = "") -> str:
    """One sentence for a message of jsonargparse; `known` holds the type of every option."""
    text = re.sub(r"\s+", " ", message).strip().rstrip(".")
    if match := re.search(r"[Pp]arser key [\"']([\w.]+)[\"']", text):
        value = re.search(r"(?:(?:Got|Given) value: |Unable to load config [\"'])(.*?)[\"']?(?: - .*)?$", text)
        if match[1] in known and value:
            return _wrong_type(where + match[1], known[match[1]], value[1])
    if match := re.search(r"argument (--[\w.]+)[^:]*: expected one argument", text):
        return f"{match[1]} needs a value."
    if match := re.search(r"(?:unrecognized arguments: --|(?:option|key) ')([\w.]+)", text):
        unknown = match[1]
        if group := re.search(r"Group '([\w.]+)'", text):
            unknown = f"{group[1]}.{unknown}"
        near = _nearest(unknown, [*known, "recipe", "help", "print_config", "traceback"]) or "; --help lists all."
        return f"Unknown option or recipe key {unknown!r}{near}"
    if match := re.search(r"unrecognized arguments: (.*)", text):
        return f"Argument {match[1]!r} belongs to no option; options begin with --, and --help lists them."
    return f"{text}."


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
