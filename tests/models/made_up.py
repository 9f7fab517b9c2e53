"""Hugging Face folders that are damaged or made up, one fault each, and what is said of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def configured(**fields: Any) -> Callable[[Path], None]:
    """Set fields of config.json; ... removes one."""

    def mutate(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return mutate


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return mutate


def sharded(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """Split the weights into two files with an index, and change that."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        names, index = sorted(tensors), {}
        for number, part in enumerate((names[:5], names[5:]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        change(content, folder)
        (folder / INDEX).write_text(json.dumps(content))

    return mutate


def linked(name: str) -> Callable[[Path], None]:
    """Put a link in the place of a file, which leads to it elsewhere."""

    def mutate(folder: Path) -> None:
        os.rename(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return mutate


def everywhere(value: str) -> Callable[[dict[str, Any], Path], None]:
    """A weight map in which every tensor lies in the file `value`."""
    return lambda content, folder: content.update(weight_map=dict.fromkeys(content["weight_map"], value))


def first(content: dict[str, Any]) -> str:
    return min(content["weight_map"])


HEADER = struct.pack("<Q", 2**60) + b"{}"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "config is empty": (written(CONFIG, ""), "config.json .*is no JSON"),
    "config is bytes": (written(CONFIG, b"\xff\x00"), "config.json .*is no JSON"),
    "config is deep": (written(CONFIG, "[" * 100_000), "config.json .*is no JSON"),
    "config is a list": (written(CONFIG, "[1]"), "config.json .*an object"),
    "config is huge": (written(CONFIG, " " * (1 << 24) + " {}"), "config.json has more than"),
    "config is a pipe": (lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)), "config.json"),
    "config is a link": (linked(CONFIG), "config.json is a link"),
    "layers is text": (configured(num_hidden_layers="2"), "num_hidden_layers: .*integer"),
    "layers is 10**12": (configured(num_hidden_layers=10**12), "num_hidden_layers: .*less than or equal to 1000"),
    "layers is 0": (configured(num_hidden_layers=0), "num_hidden_layers: .*greater"),
    "layers is another": (configured(num_hidden_layers=7), "lacks|names no depth of 2"),
    "width is negative": (configured(hidden_size=-16), "hidden_size: .*greater"),
    "width is a list": (configured(hidden_size=[16]), "hidden_size: "),
    "width is NaN": (configured(hidden_size=float("nan")), "hidden_size: "),
    "architectures is text": (configured(architectures="BertForMaskedLM"), "architectures: .*array"),
    "weights are a link": (linked(SINGLE), "model.safetensors is a link"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has no model.safetensors"),
    "pickled weights": (
        lambda f: ((f / SINGLE).unlink(), (f / "pytorch_model.bin").write_bytes(b"\x80\x04.")),
        "weights as pytorch_model.bin only, a format that can run code",
    ),
    "weights are empty": (written(SINGLE, b""), "safetensors files of .* are damaged"),
    "weights are text": (written(SINGLE, "x" * 1000), "safetensors files of .* are damaged"),
    "a huge header": (written(SINGLE, HEADER), "safetensors files of .* are damaged"),
    "a deep header": (written(SINGLE, struct.pack("<Q", 100_000) + b"[" * 100_000), "are damaged"),
    "no tensors": (written(SINGLE, struct.pack("<Q", 8) + b"{}      "), "hold no tensors|hold 0|lacks"),
    "a tensor cut off": (
        lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 8), "safetensors files of .* are damaged"
    ),
    "an index that leads up": (sharded(everywhere("../x.safetensors")), "'../x.safetensors', which leads out"),
    "an index that leads away": (sharded(everywhere("/etc/x.safetensors")), "'/etc/x.safetensors', which leads out"),
    "an index of no safetensors": (sharded(everywhere("README.md")), "'README.md', which is no safetensors file"),
    "an index of what is not there": (sharded(everywhere("a.safetensors")), "has no a.safetensors"),
    "an index of nothing": (sharded(lambda c, f: c.update(weight_map={})), "names no tensor"),
    "an index without a map": (sharded(lambda c, f: c.pop("weight_map")), "weight_map: field required"),
    "an index of numbers": (sharded(lambda c, f: c["weight_map"].update({first(c): 3})), "weight_map.*string"),
    "an index that is a list": (sharded(lambda c, f: c.update(weight_map=[])), "weight_map: .*an object"),
    "a shard that is a link": (
        sharded(lambda c, f: linked("model-00001-of-00002.safetensors")(f)), "00002.safetensors is a link"
    ),
}  # fmt: skip
"""What every reader of such a folder refuses."""

GROWTH_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of its own": (configured(auto_map={"AutoModel": "evil.Model"}), "names code of its own .*is not run"),
    "a tensor in the other file": (
        sharded(lambda c, f: c["weight_map"].update({first(c): "model-00002-of-00002.safetensors"})),
        "lies in 'model-00002-of-00002.safetensors', which lacks it",
    ),
    "a tensor that is nowhere": (
        sharded(lambda c, f: c["weight_map"].update({"x": "model-00002-of-00002.safetensors"})), "'x' lies in"
    ),
    "a tensor twice": (
        sharded(
            lambda c, f: save_file(
                {first(c): torch.ones(3), **load_file(f / "model-00002-of-00002.safetensors")},
                f / "model-00002-of-00002.safetensors",
            )
        ),
        "lies in model-00001-of-00002.safetensors and model-00002",
    ),
    "a long name": (weights(lambda t: t.update({"x." + "9" * 5000 + ".y": torch.ones(1)})), "a name too long"),
    "a block with zeros before": (
        weights(lambda t: [t.update({n.replace("layer.0.", "layer.00."): t.pop(n)}) for n in sorted(t)]),
        "blocks have no plain numbers",
    ),
    "a type of 8 bits": (
        weights(lambda t: t.update({"x": torch.zeros(2).to(torch.float8_e4m3fn)})), "'x' has the type F8"
    ),
    "no blocks": (weights(lambda t: [t.pop(n) for n in list(t) if ".layer." in n]), "No tensors are named as"),
    "a tokenizer that is a link": (linked("tokenizer.json"), "tokenizer.json is a link"),
}  # fmt: skip
"""What growth on the disk refuses beside."""

LOADING_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a huge vocabulary": (configured(vocab_size=2**31), "describes a model of [0-9,]+ weights, but"),
    "another vocabulary": (configured(vocab_size=5), "cannot be loaded|holds no weights"),
    "another width": (configured(hidden_size=24, num_attention_heads=2), "cannot be loaded|holds no weights"),
    "heads that do not divide": (configured(num_attention_heads=3), "describes no model"),
    "an unknown activation": (configured(hidden_act="evil"), "describes no model|cannot represent"),
    "a dropout that is text": (configured(hidden_dropout_prob="x"), "holds no transformers model|describes no model"),
    "an unknown kind of model": (configured(model_type="evil"), "holds no transformers model"),
    "no kind of model": (configured(model_type=..., architectures=...), "holds no transformers model"),
    "code of its own": (
        configured(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        "holds no transformers model",
    ),
    "an unknown type": (configured(dtype="evil", torch_dtype="evil"), "holds no transformers model|cannot be loaded|"),
}
"""What is refused where transformers loads the model."""
