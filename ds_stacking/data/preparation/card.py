"""The data card of a prepared folder: what a person wants to know before training on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds_stacking.common.files import whole_file, write_text
from ds_stacking.data.manifests import SPLITS
from ds_stacking.data.token_file import Split

CARD, FIGURE = "card.md", "lengths.png"


def write_card(folder: Path, manifest: dict[str, Any], splits: dict[str, Split], examples: list[str]) -> None:
    """Write card.md and, beside it, the figure of the documents' lengths."""
    lengths: dict[str, np.ndarray] = {
        split: np.concatenate([np.diff(file.offsets) - 1 for file in splits[split].files]) for split in SPLITS
    }
    draw_lengths(lengths, folder / FIGURE)
    write_text(folder / CARD, card(manifest, lengths, examples))


def card(manifest: dict[str, Any], lengths: dict[str, np.ndarray], examples: list[str]) -> str:
    """The card's text; `lengths` [documents] by split are in tokens, without [SEP]."""
    identity, totals, leak = manifest["identity"], manifest["totals"], manifest["leak"]
    tokens = sum(int(values.sum()) for values in lengths.values())
    words = totals["words"]
    rows = [
        ("documents read", f"{manifest['read']:,}"),
        ("left out: empty", f"{totals.get('empty', 0):,}"),
        ("left out: equal to an earlier one", f"{totals.get('equal', 0):,}"),
        ("left out: nearly equal to an earlier one", _near(identity, totals)),
        ("documents kept", f"{sum(map(len, lengths.values())):,}"),
        ("words", f"{words:,}"),
        ("tokens per word", f"{tokens / max(1, words):.3f}"),
        ("vocabulary", f"{manifest['vocab_size']:,}"),
        ("unigram entropy", f"{manifest['unigram_entropy']:.3f} nat"),
        (f"held-out {leak['length']}-grams that stand in train", _share(leak["found"], leak["ngrams"])),
        ("held-out documents half found in train", _share(leak["leaked_documents"], leak["documents"])),
        ("files left out", f"{len(manifest['skipped']):,}"),
    ]
    splits = [
        (
            split,
            f"{len(values):,}",
            f"{manifest[split]['tokens']:,}",
            f"{np.median(values):,.0f}" if len(values) else "-",
        )
        for split, values in lengths.items()
    ]
    return "\n".join(
        [
            "# Data card",
            "",
            f"Source: `{identity['source']['source']}`; tokenizer: `{manifest['tokenizer']}`; "
            f"{identity['eval_percent']:g} % of the documents held out by a hash of their text.",
            "",
            _table(("", "")) + _rows(rows),
            _table(("split", "documents", "tokens", "median length")) + _rows(splits),
            f"![documents by their length in tokens]({FIGURE})",
            "",
            *_source_lines(identity["source"]),
            *_fault_lines(manifest["skipped"]),
            "## Examples",
            "",
            *(f"> {' '.join(text.split())} ...\n" for text in examples[:5]),
        ]
    )


def draw_lengths(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Draw the share of tokens and of documents by document length, on a logarithmic axis."""
    from matplotlib.figure import Figure

    every = np.concatenate(list(lengths.values()))
    every = every[every > 0]
    edges = (
        np.geomspace(every.min(initial=2**40), every.max(initial=1) + 1, 31) if len(every) else np.array([1.0, 2.0])
    )
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for label, weights in (("of documents", np.ones(len(every))), ("of tokens", every)):
        share = 100 * np.histogram(every, edges, weights=weights)[0] / max(1, weights.sum())
        axis.stairs(share, edges, label=label, fill=label == "of documents", alpha=0.4 if "doc" in label else 1)
    axis.set_xscale("log")
    axis.set(xlabel="length of the document in tokens", ylabel="share in percent")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _near(identity: dict[str, Any], totals: dict[str, int]) -> str:
    threshold = identity["near_duplicates"]
    return f"{totals.get('near', 0):,} (similarity {threshold:g} or more)" if threshold else "not looked for"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.2f} %)"


def _table(head: tuple[str, ...]) -> str:
    return f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n"


def _rows(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _source_lines(source: dict[str, Any]) -> list[str]:
    files = source.get("files", [])
    shown = [f"- `{name}`, {size:,} bytes" for name, size, _ in files[:20]]
    more = [f"- and {len(files) - 20} more"] if len(files) > 20 else []
    other = {name: value for name, value in source.items() if name not in ("source", "files", "versions") and value}
    return ["## Source", "", *shown, *more, *(f"- {name}: {value}" for name, value in other.items()), ""]


def _fault_lines(skipped: dict[str, str]) -> list[str]:
    lines = [f"- `{name}`: {fault}" for name, fault in list(skipped.items())[:20]]
    return ["## Files left out", "", *lines, ""] if lines else []
