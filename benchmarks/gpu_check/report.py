"""The journal as a short table: what is wrong, what missed its target, then the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu_check.facts import DRY
from benchmarks.gpu_check.journal import Record
from benchmarks.gpu_check.targets import GOALS, GROWTH_SECONDS, TARGETS, Goal, Target

Records = Mapping[str, Record]


def limit(row: Record, mode: str, rates: Mapping[str, float]) -> float | None:
    """Seconds that the machine's own rates allow for a mode of a row of speed.py; None without rates or work."""
    work = [(row["bytes"].get(mode), rates.get("copy")), (row["flops"].get(mode), rates.get("matmul"))]
    found = [amount / rate for amount, rate in work if amount and rate]
    return max(found) if found else None


def ratio(target: Target, row: Record, rates: Mapping[str, float]) -> float | None:
    """A peer's seconds divided by ours, or our share of the limit; None where there is nothing to compare with."""
    times = {name: quartiles[1] for name, quartiles in row["modes"][target.mode]["times"].items()}
    found = limit(row, target.mode, rates) if target.peer == "limit" else times.get(against(target, row))
    return found / times["ours"] if found else None


def against(target: Target, row: Record) -> str:
    """The peer's name; of "best" that of the fastest peer, where there is one."""
    times = {name: quartiles[1] for name, quartiles in row["modes"][target.mode]["times"].items() if name != "ours"}
    return min(times, key=times.__getitem__) if target.peer == "best" and times else target.peer


def judged(target: Target, row: Record, rates: Mapping[str, float]) -> str:
    """What a target says of a row: [peer reached/must verdict], in which the best peer is named."""
    value = ratio(target, row, rates)
    name = against(target, row)
    peer = f"best: {name}" if name != target.peer else name
    reached = "absent" if value is None else f"{value:.2f}/{target.must} {verdict(value, target.must, target.goal)}"
    return f" [{peer} {reached}]"


def verdict(value: float | None, must: float, goal: float) -> str:
    """goal, must, MISSED or absent; values are better the higher they are."""
    if value is None:
        return "absent"
    return "goal" if value >= goal else "must" if value >= must else "MISSED"


def is_dry(records: Records) -> bool:
    """Whether the times mean nothing."""
    return records.get("environment", {}).get("device") == DRY


def speed_lines(records: Records) -> Iterator[str]:
    """One line per mode: our microseconds and share of the limit, the peers' microseconds, ratios beside targets."""
    rates = records.get("rates", {}).get("rates", {})
    targets = {} if is_dry(records) else TARGETS
    for name, row in records.items():
        if "modes" not in row:
            continue
        case = name.removeprefix("speed: ")
        absent = " | absent: " + ", ".join(row["absent"]) if row["absent"] else ""
        yield case + absent + _note(row)
        for mode, measured in row["modes"].items():
            times = {who: quartiles[1] * 1e6 for who, quartiles in measured["times"].items()}
            allowed = limit(row, mode, rates)
            share = f" {allowed * 1e8 / times['ours']:.0f}%" if allowed else ""
            others = "".join(f" {who} {seconds:.0f}" for who, seconds in times.items() if who != "ours")
            clock = " CLOCK FELL" if measured.get("clock_fell") else ""
            verdicts = "".join(judged(t, row, rates) for t in targets.get(case, []) if t.mode == mode)
            yield f" {mode:8} {times['ours']:.0f}{share} |{others}{clock}{verdicts}"
        if "peak_bytes" in row:
            yield " peak MB  " + ", ".join(f"{who} {taken / 1e6:.0f}" for who, taken in row["peak_bytes"].items())


def _note(row: Record) -> str:
    return f" ({row['note']})" if "note" in row else ""


def correctness_lines(records: Records) -> Iterator[str]:
    """How many are right, and all of what is not."""
    found = [row for name, row in records.items() if name.startswith(("correct: ", "sanitizer ")) and "ok" in row]
    yield f"correct: {sum(row['ok'] for row in found)} of {len(found)}"
    for row in found:
        if not row["ok"]:
            yield f"  WRONG {row['row']}: {_fault(row)}"


def _fault(row: Record) -> str:
    if "errors" not in row:
        return str(row.get("found", ""))[-200:]
    pairs = " ".join(f"{ours:.1e}/{peer:.1e}" for ours, peer in zip(row["errors"], row["peer"], strict=True))
    return f"errors ours/torch {pairs}" + ("" if row["repeats"] else ", and two runs differ")


def model_lines(records: Records) -> Iterator[str]:
    """Tokens per second and memory of all contenders, then what the better of ours reached of what it must."""
    for name, row in records.items():
        if "contenders" not in row:
            continue
        case, found = name.removeprefix("model: "), row["contenders"]
        yield case + _note(row)
        for who, figures in found.items():
            if "seconds" in figures:
                mfu = f" MFU {figures['mfu']:.3f}" if "mfu" in figures else ""
                speed = f"{figures['tokens_per_second'] / 1e3:,.1f} k tokens/s"
                yield f" {who}: {speed}{mfu} {figures['bytes'] / 1e9:.1f} GB"
            else:
                yield f" {who}: {figures['absent'][:80]}"
        verdicts = []
        for goal in [] if is_dry(records) else GOALS.get(case, []):
            value = goal_value(goal, found)
            sign = -1 if goal.against == "memory" else 1
            state = verdict(None if value is None else sign * value, sign * goal.floor, sign * goal.must)
            state = {"goal": "must", "must": "floor"}.get(state, state)
            text = "" if value is None else f" {value:.6g}/{goal.must:g}"
            verdicts.append(f"[{goal.against}{text} {state}]")
        if verdicts:
            yield " " + " ".join(verdicts)


def goal_value(goal: Goal, found: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The better of our contenders beside the peer, in the engine or, where there is none, in the bare loop."""
    engine = any("seconds" in found.get(name, {}) for name in ("ours", "ours compiled"))
    mine = ("ours", "ours compiled") if engine else ("bare", "bare compiled")
    ours = [found[name] for name in mine if "seconds" in found.get(name, {})]
    if not ours or (goal.against == "bare" and not engine):
        return None
    best = min(ours, key=lambda figures: figures["seconds"])
    if goal.against == "tokens/s":
        return best["tokens_per_second"]
    against = "peer" if goal.against == "memory" else goal.against
    peer = found.get(against if engine else against.replace("peer", "peer bare"), {})
    if goal.against == "memory":
        return best["bytes"] / peer["bytes"] if peer.get("bytes") else None
    return peer["seconds"] / best["seconds"] if "seconds" in peer else None


def training_lines(records: Records) -> Iterator[str]:
    """Growth, resume and comparison."""
    for name, row in records.items():
        if "growths" in row:
            for growth in row["growths"]:
                late = (
                    "" if growth["seconds"] < GROWTH_SECONDS or is_dry(records) else f" MISSED (must {GROWTH_SECONDS})"
                )
                yield (
                    f"{name} {growth['from']} -> {growth['to']}: {growth['seconds']:.3f} s{late}, with engines "
                    f"{growth['total']:.2f} s, peak {growth['peak_bytes'] / 1e9:.2f} GB, exact: {growth['exact']}"
                )
        if "same_bits" in row:
            yield f"{name}: {row['steps']} losses, the same bits after a kill: {row['same_bits']}"
        if "report" in row:
            yield f"{name}: {row['state']}\n{row['report']}"


def table(records: Records, left_out: Sequence[str]) -> str:
    """All of it, for a reply that shows its last 12,000 characters: figures first, faults last."""
    environment = records.get("environment", {})
    lines = [", ".join(f"{k} {v}" for k, v in environment.items() if k not in ("row", "seconds", "packages"))]
    rates = records.get("rates", {}).get("rates", {})
    lines += [f"{name}: {rate / 1e12:.3f} T/s" for name, rate in rates.items()]
    for section in (speed_lines, model_lines, training_lines, correctness_lines):
        lines += section(records)
    if "compilation" in records:
        lines.append(f"compilation: { {k: v for k, v in records['compilation'].items() if k not in ('row', 'at')} }")
    lines += [f"skipped {row['row']}: {row['skipped']}" for row in records.values() if "skipped" in row]
    lines += [f"ERROR {row['row']} {row.get('at', '')}: {row['error'][:300]}" for row in errors(records)]
    if left_out:
        lines.append(f"no time for {len(left_out)} rows: {', '.join(left_out)}"[:1500])
    return "\n".join(lines)


def errors(records: Records) -> list[Record]:
    """Rows that did not come to a result."""
    return [row for row in records.values() if "error" in row]


def wrong(records: Records) -> list[str]:
    """Rows whose result is wrong."""
    found = [name for name, row in records.items() if row.get("ok") is False or row.get("same_bits") is False]
    return found + [
        name for name, row in records.items() if any(not growth["exact"] for growth in row.get("growths", []))
    ]
