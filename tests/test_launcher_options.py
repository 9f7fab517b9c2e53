"""What a launcher says of its own options: one short sentence, never the usage."""

from __future__ import annotations

import pytest

from ds_stacking.common.errors import UserError
from ds_stacking.launcher_options import Options, one_of, share, wandb_name, whole_number


def options() -> Options:
    parser = Options("A launcher.", renamed={"see-ds": "seeds"})
    parser.add_argument("folder")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--mfu", type=share)
    parser.add_argument("--project", type=wandb_name)
    parser.add_argument("--clock", type=one_of("wall", "cpu"))
    return parser


def test_good_options_are_read() -> None:
    found = options().parse_args(["a", "--seeds", "12", "--mfu", "0.35", "--project", "ds-stacking", "--clock=cpu"])
    assert (found.folder, found.seeds, found.mfu, found.project, found.clock) == ("a", 12, 0.35, "ds-stacking", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "The following arguments are required: folder; see --help."),
        (["a", "--sedes", "2"], "Unknown option '--sedes'; did you mean --seeds?"),
        (["a", "--seed=2"], "Unknown option '--seed'; did you mean --seeds?"),
        (["a", "--zzz"], "Unknown option '--zzz'; --help lists all."),
        (["a", "--see-ds=2"], "see-ds is now called seeds."),
        (["a", "b"], "Argument 'b' belongs to no option"),
        (["a", "--seeds"], "--seeds expected one argument."),
        (["a", "--seeds", "x"], "--seeds is 'x'; it must be a whole number from 1 to 1,000."),
        (["a", "--seeds", "0"], "--seeds is '0'"),
        (["a", "--seeds", "-1"], "--seeds is '-1'"),
        (["a", "--seeds", "1.5"], "--seeds is '1.5'"),
        (["a", "--seeds", "٣"], "--seeds is '٣'"),
        (["a", "--seeds", "1_0"], "--seeds is '1_0'"),
        (["a", "--seeds", "9" * 5000], "--seeds is '999"),
        (["a", "--mfu", "nan"], "--mfu is 'nan'; it must be a number above 0 and at most 1."),
        (["a", "--mfu", "2"], "--mfu is '2'"),
        (["a", "--mfu", "x" * 5000], "--mfu is 'xxx"),
        (["a", "--project", "a/b"], "--project is 'a/b'"),
        (["a", "--project", "a\n"], r"--project is 'a\n'"),
        (["a", "--clock", "sun"], "--clock is 'sun'; choose from wall, cpu."),
        (["a", "--clock", "s" * 5000], "--clock is 'sss"),
    ],
)
def test_bad_ones_are_one_short_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        options().parse_args(arguments)
    assert str(error.value).startswith(message) and len(str(error.value)) < 300
