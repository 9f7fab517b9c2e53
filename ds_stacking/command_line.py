"""Options and recipes for every launcher, and how a launcher ends.

Exit codes: 0 done, 1 failed at run time, 2 bad input. Bad input is one sentence, printed once however many ranks met
it.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ds_stacking.config import RunConfig, UserError

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
"""Shipped recipes; `--recipe NAME` finds them by name."""
WAIT_FOR_RANK_0 = 5.0
"""Seconds that another rank waits before it prints bad input: rank 0 has most likely met and printed the same."""


def make_parser() -> ArgumentParser:
    """The parser of a pre-training run: a recipe file, and every field of RunConfig as an option that overrides it."""
    parser = ArgumentParser(
        prog="pretrain.py",
        description="Pre-train BERT by progressive stacking on DeepSpeed ZeRO engines. No options: the quickstart.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", action="config", help="recipe: a JSON file, or the name of a shipped one")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    parser.add_class_arguments(RunConfig, nested_key=None)
    return parser


def parse_run(arguments: Sequence[str]) -> RunConfig:
    """The run configuration that the command line describes. Raises UserError."""
    parser = make_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(_find_recipe(arguments)))
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explain(str(error), _option_names(parser))) from None
    fields = vars(parsed)
    return RunConfig(**{name: fields[name] for name in RunConfig.__dataclass_fields__})


def _find_recipe(arguments: Sequence[str]) -> list[str]:
    """Replace the name of a shipped recipe by its file."""
    result = list(arguments)
    for i, argument in enumerate(result):
        name = argument.removeprefix("--recipe=") if argument.startswith("--recipe=") else None
        if argument == "--recipe" and i + 1 < len(result):
            result[i + 1] = _recipe_file(result[i + 1])
        elif name is not None:
            result[i] = f"--recipe={_recipe_file(name)}"
    return result


def _recipe_file(name: str) -> str:
    if Path(name).is_file():
        return name
    shipped = sorted(path.stem for path in RECIPES.glob("*.json"))
    if name not in shipped:
        raise UserError(f"Recipe {name} is no file and no shipped recipe; shipped are {', '.join(shipped)}.")
    return str(RECIPES / f"{name}.json")


def _option_names(parser: ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _explain(message: str, options: list[str]) -> str:
    """One sentence for a parser's message, with the nearest known name for an unknown one."""
    text = re.sub(r"\s+", " ", message).strip().rstrip(".")
    match = re.search(r"unrecognized arguments: (--[\w.]+)", text)
    unknown = match[1] if match else None
    if match := re.search(r"(?:Group '([\w.]+)'|[Pp]arser|.*) does not accept (?:option|nested key) '([\w.]+)'", text):
        unknown = "--" + ".".join(part for part in (match[1], match[2]) if part)
    if match := re.search(r"(?:Unrecognized|unexpected) (?:key|keyword argument)s? ['\"]?([\w.]+)", text):
        unknown = "--" + match[1]
    if unknown is None:
        return f"{text}."
    near = difflib.get_close_matches(unknown, options, n=1)
    name = unknown.removeprefix("--")
    return f"Unknown option or recipe key {name!r}" + (
        f"; did you mean {near[0].removeprefix('--')!r}?" if near else "."
    )


def run_main(main: Callable[[], None]) -> int:
    """Call a launcher's body and turn what it raises into an exit code, and into words on one rank only."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except UserError as error:
        if rank != 0:
            time.sleep(WAIT_FOR_RANK_0)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0
