"""A small BERT learns the same with kernels (in the interpreter) as with their references."""

import torch
import torch.nn.functional as F

from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    embedding_norm,
    gather_rows,
    inverse_index,
    linear_cross_entropy,
)

VOCABULARY, WIDTH, HEADS, LAYERS, STEPS = 31, 32, 2, 2, 30
LENGTHS = torch.tensor([9, 15])
STARTS = torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).int()


def parameters():
    torch.manual_seed(0)
    shapes = {"word": (VOCABULARY, WIDTH), "position": (16, WIDTH), "head": (VOCABULARY,)}
    for layer in range(LAYERS):
        shapes |= {
            f"qkv{layer}": (3 * WIDTH, WIDTH), f"out{layer}": (WIDTH, WIDTH), f"out_bias{layer}": (WIDTH,),
            f"up{layer}": (4 * WIDTH, WIDTH), f"up_bias{layer}": (4 * WIDTH,),
            f"down{layer}": (WIDTH, 4 * WIDTH), f"down_bias{layer}": (WIDTH,),
        }  # fmt: skip
    found = {name: torch.randn(shape) * (0.1 if len(shape) > 1 else 0.0) for name, shape in shapes.items()}
    for norm in ["embedding", *(f"{place}{layer}" for layer in range(LAYERS) for place in ("attention", "mlp"))]:
        found |= {f"{norm}.weight": torch.ones(WIDTH), f"{norm}.shift": torch.zeros(WIDTH)}
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def loss_of(p, ids, targets, chosen, inverse, seeds):
    def norm(name, x, residual, bias, seed):
        vectors = (p[f"{name}.weight"], p[f"{name}.shift"])
        return add_layer_norm(x, *vectors, residual=residual, bias=bias, dropout=0.1, seed=seed)

    places = torch.cat([torch.arange(length) for length in LENGTHS])
    x = embedding_norm(
        ids, places, None, word=p["word"], position=p["position"], weight=p["embedding.weight"],
        shift=p["embedding.shift"], dropout=0.1, seed=next(seeds),
    )  # fmt: skip
    for layer in range(LAYERS):
        qkv = F.linear(x, p[f"qkv{layer}"]).view(-1, 3, HEADS, WIDTH // HEADS)
        attended = attention(qkv, STARTS, 16, dropout=0.1, seed=next(seeds)).flatten(1)
        x = norm(f"attention{layer}", F.linear(attended, p[f"out{layer}"]), x, p[f"out_bias{layer}"], next(seeds))
        hidden = bias_gelu(F.linear(x, p[f"up{layer}"]), p[f"up_bias{layer}"])
        x = norm(f"mlp{layer}", F.linear(hidden, p[f"down{layer}"]), x, p[f"down_bias{layer}"], next(seeds))
    return linear_cross_entropy(gather_rows(x, chosen, inverse), p["word"], p["head"], targets) / len(targets)


def train():
    p = parameters()
    optimizer = torch.optim.AdamW(p.values(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    tokens = int(LENGTHS.sum())
    text = torch.randint(1, VOCABULARY, (tokens,), generator=generator)
    losses = []
    for step in range(STEPS):
        chosen = torch.randperm(tokens, generator=generator)[:8].sort().values
        seeds = (torch.tensor([1000 * step + site]) for site in range(100))
        loss = loss_of(p, text.index_fill(0, chosen, 0), text[chosen], chosen, inverse_index(chosen, tokens), seeds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_same_losses_with_kernels_and_with_references(kernels):
    want = train()
    blocks = {"ROWS": 64, "BLOCK_N": 128, "BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_P": 4, "BLOCK_T": 4}
    with kernels(**blocks):
        got = train()
    assert want[-1] < want[0] - 1
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
