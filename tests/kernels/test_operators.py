"""The operators as torch sees them: the kernel branch on fake CUDA tensors, `torch.compile`, meta tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_stacking.kernels import (
    add_layer_norm,
    attention,
    attention_padded,
    bias_gelu,
    embedding_norm,
    gather_rows,
    linear_cross_entropy,
    linear_gelu,
    scatter_rows,
    selected_attention,
)

T, N = 32, 64


def norm(x, vector, **kwargs):
    return add_layer_norm(x, vector, vector, residual=x, bias=vector, dropout=0.1, **kwargs)


def head(x, vector):
    weight = torch.cat([x, x]).contiguous()
    return linear_cross_entropy(x, weight, weight[:, 0].contiguous(), torch.arange(T, device=x.device))


def embed(x, vector):
    index = torch.arange(T, device=x.device)
    return embedding_norm(index, index, index, word=x, position=x, segment=x, weight=vector, shift=vector, dropout=0.1)


def select(x, vector):
    index = torch.arange(T, device=x.device)
    return scatter_rows(gather_rows(x, index, index), index, index, x)


def packed(x, vector):
    starts = torch.tensor([0, T // 2, T], dtype=torch.int32).to(x.device)
    return attention(torch.cat([x, x, x], 1).view(T, 3, 4, 16), starts, T // 2, causal=True, dropout=0.1)


def selected(x, vector):
    starts = torch.tensor([0, T // 2, T], dtype=torch.int32).to(x.device)
    kv, indices = torch.cat([x, x], 1).view(T, 2, 4, 16), torch.arange(T - 1, 0, -3, device=x.device)
    return selected_attention(x[:11].view(11, 4, 16), kv, starts, T // 2, indices, dropout=0.1)


def padded(x, vector):
    return attention_padded(torch.cat([x, x, x], 1).view(2, T // 2, 3, 4, 16))


OPERATORS = {
    "add_layer_norm": norm,
    "attention": packed,
    "attention_padded": padded,
    "bias_gelu": lambda x, vector: bias_gelu(x, vector, approximate="tanh"),
    "embedding_norm": embed,
    "linear_cross_entropy": head,
    "linear_gelu": lambda x, vector: linear_gelu(x, x[:8].contiguous(), vector[:8].contiguous()),
    "select_rows": select,
    "selected_attention": selected,
}


def gradients(run):
    def joint(x, vector):
        x, vector = x.detach().requires_grad_(), vector.detach().requires_grad_()
        out = run(x, vector)
        return out, *torch.autograd.grad(out.sum(), [x, vector], allow_unused=True)

    return joint


class Calls(TorchDispatchMode):
    """Keeps the calls of our operators, forward and backward, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ds_stacking":
            self.found.append((func, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


def operator_calls(name):
    with Calls() as calls:
        gradients(OPERATORS[name])(torch.randn(T, N), torch.randn(N))
    assert len(calls.found) >= 2, "a forward and a backward operator"
    return calls.found


def on_fake_gpu(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_are_traced_on_a_fake_gpu(name):
    """What torch.compile does on a GPU: fake tensors run the host code, and the graph holds the kernel launches."""
    for func, args in operator_calls(name):
        outputs = func(*args)
        with FakeTensorMode(), torch.no_grad():
            fake = [on_fake_gpu(a) if isinstance(a, torch.Tensor) else a for a in args]
            for out, real in zip(*(tree_leaves(x) for x in (func(*fake), outputs)), strict=True):
                assert out.device.type == "cuda" and out.shape == real.shape and out.dtype == real.dtype
            graph = make_fx(dispatch_functionalize(func))(*fake).graph
        assert [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)], graph


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_without_graph_breaks(name):
    x, vector = torch.randn(T, N), torch.randn(N)
    run = OPERATORS[name]
    torch.manual_seed(0)
    want = gradients(run)(x, vector)

    torch.compiler.reset()  # all operators are compiled as one function, which has a limit

    def loss(x, vector):
        return run(x, vector)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    for got, expected in zip(gradients(compiled)(x, vector), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_on_a_cpu(name):
    for func, args in operator_calls(name):
        torch.library.opcheck(func, tuple(args), test_utils=("test_schema", "test_faketensor"))
