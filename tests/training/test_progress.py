"""What a person sees: plain lines in a log, a bar on a terminal, nothing on other ranks."""

import io

from ds_stacking.training.progress import Console, RichConsole, growth_line, make_console

GROWTH = {
    "from_layers": 2,
    "to_layers": 4,
    "operator": "stack",
    "optimizer_state": "stack",
    "seconds_growth": 0.4,
    "eval_loss_before": 5.61,
    "eval_loss_after": 5.93,
    "tensors_verified": 52,
}
SUMMARY = {
    "stages": [
        {"layers": 2, "steps": 450, "tokens": 921_600, "seconds": 185.2, "flops": 2.5e12, "train_loss_end": 5.5}
    ],
    "eval_loss_masked": 3.25,
    "unigram_cross_entropy": 6.125,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_goes_away_ends_nothing():
    console = RichConsole(Gone(), every=0.0)
    train(console, [0.0], steps=3)
    console.log("an event")
    console.close()


def train(console: Console, clock: list[float], steps: int, done: int = 0) -> None:
    console.start_stage(stage=0, stages=2, layers=2, steps=steps, done=done)
    for step in range(done + 1, steps + 1):
        clock[0] += 1.0
        console.update(step, {"loss": 5.0, "lr": 1e-3, "tokens_per_second": 12_345})


def test_a_log_gets_a_line_now_and_then_with_the_time_left():
    stream, clock = io.StringIO(), [0.0]
    train(RichConsole(stream, every=10.0, now=lambda: clock[0]), clock, steps=25)
    lines = stream.getvalue().splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "stage 1/2, 2 layers  step 11/25  loss 5.000  lr 1.00e-03  12.3 k tokens/s  14.0 s left"
    assert "\x1b" not in stream.getvalue()


def test_time_left_of_a_resumed_stage_rests_on_this_process_only():
    stream, clock = io.StringIO(), [0.0]
    train(RichConsole(stream, now=lambda: clock[0]), clock, steps=25, done=20)
    assert stream.getvalue().splitlines()[0].endswith("4.0 s left")


def test_a_terminal_gets_a_bar_and_events_above_it():
    stream, clock = Terminal(), [0.0]
    console = RichConsole(stream, now=lambda: clock[0])
    train(console, clock, steps=5)
    console.log("an event about [MASK]")
    console.close()
    assert "━" in stream.getvalue()
    assert "an event about [MASK]" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_resolved_configuration_shows_every_title_and_value():
    stream = io.StringIO()
    RichConsole(stream).resolved({"ranks": 2, "precision": "fp32 (no [bf16] here)"})
    assert [line.split(maxsplit=1)[0] for line in stream.getvalue().splitlines() if line.strip()] == [
        "ranks",
        "precision",
    ]
    assert "fp32 (no [bf16] here)" in stream.getvalue()


def test_closing_table_and_figures():
    stream = io.StringIO()
    RichConsole(stream).closing(SUMMARY)
    text = stream.getvalue()
    row = next(line for line in text.splitlines() if "450" in line)
    assert row.split() == ["2", "450", "921.6", "k", "3:05", "min", "2.5", "TFLOP", "5.500", "-", "-"]
    assert "on [MASK] only" in text
    assert "3.250  held-out loss on [MASK] positions" in text
    assert "6.125  unigram line" in text
    assert "-  sensitivity to order" in text


def test_growth_line():
    assert growth_line(GROWTH) == (
        "growth 2 -> 4 layers (stack, optimizer state stack) in 0.4 s; "
        "held-out loss 5.610 -> 5.930; 52 tensors verified"
    )


def test_other_ranks_are_silent(capsys):
    console = make_console(3)
    assert isinstance(console, Console)
    console.resolved({"ranks": 4})
    console.start_stage(stage=0, stages=1, layers=2, steps=3)
    console.update(1, {"loss": 1.0, "lr": 1.0, "tokens_per_second": 1.0})
    console.log("text")
    console.closing(SUMMARY)
    console.close()
    assert capsys.readouterr().out == ""
    make_console(0).log("text")
    assert capsys.readouterr().out == "text\n"
