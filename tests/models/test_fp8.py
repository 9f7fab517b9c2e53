"""Blocks whose linear layers multiply in 8 bits: near fp64, exact where a growth is, and like bf16 in all else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ds_stacking.config import ModelConfig
from ds_stacking.models import fp8
from ds_stacking.models.bert import Bert
from ds_stacking.models.blocks import Linear
from ds_stacking.models.compiling import compile_parts
from ds_stacking.models.fp8 import linear, use_fp8
from ds_stacking.models.variants import bert_class, multiplies_fp8

CONFIG = ModelConfig(hidden_size=32, num_heads=2, intermediate_size=48, vocab_size=101, max_positions=32)
RMS = {"out": 0.045, "dx": 0.08, "dweight": 0.08}
"""Error relative to the exact product, in rms. A rounding to e4m3 errs by 2^-4 at most and, evenly spread, by some
2.6% in rms, one to e5m2 by twice that; those of both operands add up as squares: 3.7% and 5.8%. A bf16 has 0.2%."""


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def products(x: Tensor, weight: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The product and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear(x, weight, None)
    out.backward(dout)
    assert x.grad is not None and weight.grad is not None
    return {"out": out.detach(), "dx": x.grad, "dweight": weight.grad}


def errors(x: Tensor, weight: Tensor, dout: Tensor) -> dict[str, float]:
    """Their errors in rms, relative to fp64."""
    found, (x, weight, dout) = products(x, weight, dout), (t.double() for t in (x, weight, dout))
    rows, gradients = x.flatten(0, -2), dout.flatten(0, -2)
    exact = {"out": x @ weight.t(), "dx": dout @ weight, "dweight": gradients.t() @ rows}
    assert all(found[name].shape == exact[name].shape for name in exact)
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("tokens", [(5, 13), (64,), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_near_the_exact_ones(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dout = torch.randn(*tokens, 80), 0.02 * torch.randn(48, 80), 1e-6 * torch.randn(*tokens, 48)
    found = errors(x.to(dtype), weight.to(dtype), dout.to(dtype))
    assert all(0.002 < found[name] < RMS[name] for name in RMS), found


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_values_lose_nothing(size: float) -> None:
    x, weight, dout = torch.randn(33, 64), 0.02 * torch.randn(32, 64), torch.randn(33, 32)
    usual = errors(x.bfloat16(), weight.bfloat16(), dout.bfloat16())
    sized = errors((x * size).bfloat16(), weight.bfloat16(), (dout / size).bfloat16())
    assert sized == pytest.approx(usual, rel=0.05)


def test_zeros_are_zeros() -> None:
    x, weight, dout = torch.randn(20, 32), torch.randn(16, 32), torch.randn(20, 16)
    for inputs in ((0 * x, weight, dout), (x, 0 * weight, dout), (x, weight, 0 * dout)):
        found = products(*(t.bfloat16() for t in inputs))
        assert all(value.isfinite().all() for value in found.values())
        assert sum(not value.any() for value in found.values()) == 2


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, weight, dout = torch.randn(20, 32), torch.randn(16, 32), torch.randn(20, 16)
    dout[3, 4] = value
    found = products(x.bfloat16(), weight.bfloat16(), dout.bfloat16())
    assert found["out"].isfinite().all()
    assert found["dx"].isnan().all() and found["dweight"].isnan().all()
    x[7, 2] = value
    assert products(x.bfloat16(), weight.bfloat16(), dout.bfloat16())["out"].isnan().all()


def test_swapped_scales_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fp8.multiply
    monkeypatch.setattr(
        fp8, "multiply", lambda a, a_scale, b, b_scale, *more, **how: original(a, a_scale, b, a_scale, *more, **how)
    )
    found = errors(torch.randn(40, 80), 0.02 * torch.randn(48, 80), torch.randn(40, 48))
    assert all(found[name] > RMS[name] for name in RMS), found


def test_a_part_of_the_outputs() -> None:
    layer = Linear(32, 96, 0.02).bfloat16()
    torch.nn.init.normal_(layer.bias)
    layer.product = linear
    x = torch.randn(3, 7, 32).bfloat16()
    part, whole = layer(x, outputs=(32, 64)), layer(x)
    torch.testing.assert_close(part, whole[..., 32:], rtol=0.1, atol=0.05)
    torch.testing.assert_close(layer(x, biased=False) + layer.bias, whole, rtol=0.02, atol=0.01)
    part.float().sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.tensor([0.0] * 32 + [21.0] * 64).bfloat16())
    assert not layer.weight.grad[:32].any() and layer.weight.grad[32:].all()


def batch() -> dict[str, Tensor]:
    ids = torch.arange(1, 61).view(3, 20)
    positions = torch.arange(9) * 6 + 1
    return {"input_ids": ids, "masked_positions": positions, "labels": ids.flatten()[positions]}


def made(fused: bool, eight: bool, layers: int = 2, **settings: object) -> Bert:
    torch.manual_seed(1)
    model = bert_class(fused)(ModelConfig(**{**vars(CONFIG), **settings}), layers).bfloat16().train()
    if eight:
        use_fp8(model)
    return model


def gradients(model: Bert) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**batch()).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("fused", [False, True])
def test_four_layers_of_a_block_and_no_other(fused: bool, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = fp8.multiply
    monkeypatch.setattr(
        fp8, "multiply", lambda a, s, b, *more, **how: seen.append(tuple(b.shape)) or original(a, s, b, *more, **how)
    )
    eight, sixteen = (made(fused, eight, norm=norm, dropout=0.0, attention_dropout=0.0) for eight in (True, False))
    ours, theirs = gradients(eight), gradients(sixteen)
    forward = [shape for shape in seen if shape in ((96, 32), (64, 32), (32, 32), (48, 32), (32, 48))]
    assert len(seen) == 3 * 9, "four products of a block, five of the last, which splits queries from the others"
    assert len(forward) >= 9
    assert float((ours[0] - theirs[0]).abs() / theirs[0]) < 0.02
    assert set(ours[1]) == set(theirs[1]) == {name for name, _ in eight.named_parameters()}
    for name, ours_ in ours[1].items():
        if "norm" not in name and theirs[1][name].norm() > 1e-3:
            cosine = torch.cosine_similarity(ours_.flatten().float(), theirs[1][name].flatten().float(), 0)
            assert cosine > 0.9, (name, cosine)


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_and_compilation_change_nothing(fused: bool) -> None:
    plain = gradients(made(fused, True, dropout=0.0, attention_dropout=0.0))
    again = gradients(made(fused, True, dropout=0.0, attention_dropout=0.0, gradient_checkpointing=True))
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])
    torch.compiler.reset()
    compiled = made(fused, True, dropout=0.0, attention_dropout=0.0)
    compile_parts(compiled, backend="aot_eager")
    found = gradients(compiled)
    torch.testing.assert_close(found[0], plain[0], rtol=0.01, atol=0)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=0.1, atol=0.05 * float(gradient.abs().max()) + 1e-4)


def test_zero_output_blocks_keep_the_function_to_the_bit() -> None:
    small = made(False, True, norm="pre", dropout=0.0, attention_dropout=0.0).eval()
    large = made(False, True, layers=3, norm="pre", dropout=0.0, attention_dropout=0.0).eval()
    weights = dict(small.state_dict())
    for name, value in small.state_dict().items():
        if name.startswith("blocks.1."):
            added = 0 * value if ".out." in name or ".down." in name else value
            weights[name.replace("blocks.1.", "blocks.2.")] = added
    large.load_state_dict(weights)
    with torch.no_grad():
        inputs = {name: value for name, value in batch().items() if name == "input_ids"}
        assert torch.equal(small(**inputs).hidden, large(**inputs).hidden)


def test_training_comes_near_that_in_bf16() -> None:
    def losses(eight: bool) -> list[float]:
        model = made(False, eight, dropout=0.0, attention_dropout=0.0)
        masters = [p.detach().float().requires_grad_() for p in model.parameters()]
        adamw, found = torch.optim.AdamW(masters, lr=3e-3), []
        for _ in range(40):
            loss, grads = gradients(model)
            found.append(float(loss) / 9)
            for master, gradient in zip(masters, grads.values(), strict=True):
                master.grad = gradient.float()
            adamw.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
        return found

    ours, theirs = losses(True), losses(False)
    assert theirs[-1] < 0.5 * theirs[0]
    assert ours != theirs
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.15, (ours, theirs)


def test_a_copy_of_a_model_multiplies_alike() -> None:
    model = made(False, True, dropout=0.0, attention_dropout=0.0)
    assert torch.equal(gradients(model)[0], gradients(copy.deepcopy(model))[0])


def test_devices_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_fp8(torch.device("cpu"))
    for capability, expected in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert multiplies_fp8(torch.device("cuda")) is expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not multiplies_fp8(torch.device("cuda"))
