"""Options by argparse, whatever is wrong with them said in one sentence."""

from __future__ import annotations

import math
import re
import sys
from argparse import ArgumentError, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from ds_stacking.common.errors import UserError
from ds_stacking.common.failures import EPILOG
from ds_stacking.common.words import nearest, plain, shown


class Options(ArgumentParser):
    """A parser without abbreviations that raises UserError in the place of printing its usage and ending."""

    def __init__(
        self, description: str, *, renamed: Mapping[str, str] | None = None, others: Iterable[str] = (), **more: Any
    ) -> None:
        """`renamed`: new names of options by their old ones; `others`: those that were taken off before."""
        super().__init__(description=description, epilog=EPILOG, allow_abbrev=False, exit_on_error=False, **more)
        self._renamed, self._others = renamed or {}, tuple(others)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all of the command line. Raises UserError."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            raise UserError(self._unknown(left[0].partition("=")[0]))
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the command line; also what of it belongs to no option. Raises UserError."""
        for option in sys.argv[1:] if args is None else args:
            name = option.partition("=")[0].removeprefix("--")
            if option.startswith("--") and name in self._renamed:
                raise UserError(f"{name} is now called {self._renamed[name]}.")
        try:
            return super().parse_known_args(args, namespace)
        except ArgumentError as error:
            raise UserError(f"{error.argument_name} {plain(error.message, 200).rstrip('.')}.") from None

    def error(self, message: str) -> NoReturn:
        """Raise UserError where something is missing."""
        raise UserError(f"{message[0].upper()}{plain(message[1:], 200)}; see --help.")

    def _unknown(self, option: str) -> str:
        name = option.removeprefix("--")
        if not option.startswith("-"):
            return f"Argument {shown(option)} belongs to no option; options begin with --, and --help lists them."
        known = [string for string in self._option_string_actions if string.startswith("--")]
        known += [f"--{other}" for other in (*self._others, "traceback")]
        near = nearest(f"--{name}", known, otherwise="--help lists all.")
        return f"Unknown option {shown(option)}; {near}"


def one_of(*names: str) -> Callable[[str], str]:
    """The type of an option that is one of the `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"is {shown(text)}; {nearest(text, names)}")
        return text

    return read


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is a whole number in `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()) or not least <= int(text) <= most:
            raise ArgumentTypeError(f"is {shown(text)}; it must be a whole number from {least} to {most:,}.")
        return int(text)

    return read


def positive(text: str) -> float:
    """The type of an option that is a positive number."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"is {shown(text)}; it must be a positive number.")
    return number


def share(text: str) -> float:
    """The type of an option that is a number above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"is {shown(text)}; it must be a number above 0 and at most 1.")
    return number


def _number(text: str) -> float:
    """A number as a person writes it; 0 for what is none."""
    try:
        return float(text) if text.isascii() and "_" not in text else 0.0
    except ValueError:
        return 0.0


def wandb_name(text: str) -> str:
    """The type of an option that names a project, user or team of wandb."""
    if not re.fullmatch(r"[A-Za-z0-9][\w .-]{0,127}", text, re.ASCII) or text != text.strip():
        raise ArgumentTypeError(f"is {shown(text)}; give up to 128 letters, digits, '-', '_' and '.'.")
    return text
