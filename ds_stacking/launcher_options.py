"""The few options that a launcher has for itself, by argparse, whatever is wrong with them said in one sentence."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from ds_stacking.common.errors import UserError
from ds_stacking.common.explain import EPILOG
from ds_stacking.common.words import nearest, plain, shown


class Options(ArgumentParser):
    """A parser without abbreviations that raises UserError in the place of printing its usage and ending."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, epilog=EPILOG, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message in a sentence of ours."""
        text = " ".join(message.split())
        if match := re.match(r"unrecognized arguments: (.*)", text):
            raise UserError(self._unknown(match[1]))
        if match := re.match(r"argument ([^:]*): expected (one|at least one) argument", text):
            raise UserError(f"{match[1]} needs a value.")
        if match := re.match(r"argument ([^:]*): invalid choice: (.*?) \(choose from (.*)\)", text):
            known = re.sub("'", "", match[3])
            raise UserError(f"{match[1]} is {plain(match[2], 200)}; choose from {known}.")
        if match := re.match(r"argument ([^:]*): (.*)", text):
            raise UserError(f"{match[1]} {match[2].rstrip('.')}.")
        if match := re.match(r"the following arguments are required: (.*)", text):
            raise UserError(f"{match[1]} is missing; give it.")
        raise UserError(f"{plain(text, 200)}; see --help.")

    def _unknown(self, arguments: str) -> str:
        first = arguments.split()[0].partition("=")[0]
        known = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
        if not first.startswith("-"):
            return f"Argument {shown(first)} belongs to no option; options begin with --, and --help lists them."
        return f"Unknown option {shown(first)}; {nearest(first.lstrip('-'), known)}"


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
