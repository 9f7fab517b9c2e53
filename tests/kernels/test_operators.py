"""The operators as torch sees them: the kernel branch on fake CUDA tensors, `torch.compile`, meta tensors."""

import pytest
import torch
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import LoweringException
from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
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


def norm(x, vector):
    y, again = add_layer_norm(x, vector, vector, residual=x, bias=vector, dropout=0.1, twice=True)
    return y * again.cos()


def head(x, vector, keep=False):
    weight = torch.cat([x, x]).contiguous()
    target = torch.arange(T, device=x.device)
    return linear_cross_entropy(x, weight, weight[:, 0].contiguous(), target, keep_logits=keep)


def embed(x, vector):
    index = torch.arange(T, device=x.device)
    tables = {"word": x, "position": x, "segment": x, "weight": vector, "shift": vector}
    y, again = embedding_norm(index, index[: T // 2], None, **tables, dropout=0.1, twice=True)
    return y * again.cos()


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
    "linear_cross_entropy_kept": lambda x, vector: head(x, vector, keep=True),
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


OPAQUE = {getattr(torch.ops.ds_stacking, name).default for name in (
    "kept_cross_entropy", "kept_cross_entropy_backward", "linear_cross_entropy_backward",
)}  # fmt: skip
"""Operators that torch.compile does not look into: they write products in place."""


class Calls(TorchDispatchMode):
    """Keeps the calls of our operators, forward and backward, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ds_stacking":
            self.found.append((func, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


def operator_calls(name, dtype=torch.float32):
    with Calls() as calls:
        gradients(OPERATORS[name])(torch.randn(T, N).to(dtype), torch.randn(N).to(dtype))
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
        inside = "triton_kernel_wrapper" if func not in OPAQUE else str(func)
        assert [node for node in graph.nodes if inside in str(node.target)], graph


def lower(function, args):
    """Turn `function` of `args` on a GPU into inductor's kernels, short of writing them, which asks the GPU."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode, torch.no_grad():
        fake = [on_fake_gpu(a) for a in args if isinstance(a, torch.Tensor)]

        def of_tensors(*tensors):
            left = iter(tensors)
            return function(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

        traced = make_fx(dispatch_functionalize(of_tensors), decomposition_table=select_decomp_table())(*fake)
        decompose_triton_kernel_wrapper_functional(traced.graph)
        traced.recompile()
        graph = GraphLowering(traced, example_inputs=fake, shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            graph.run(*fake)


@pytest.mark.parametrize("name", OPERATORS)
def test_inductor_compiles_every_operator_in_bf16(name):
    for func, args in operator_calls(name, torch.bfloat16):
        lower(func, args)


def test_what_inductor_cannot_compile_is_noticed():
    """The sum of products that the head's backward pass hides from it."""
    x = torch.randn(T, T).bfloat16()
    with pytest.raises((LoweringException, TypeError), match=r"addmm|torch\.dtype"):  # by versions of torch
        lower(lambda total, a: torch.addmm(total, a, a, out_dtype=torch.float32), [x.float(), x])


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_without_graph_breaks(name):
    x, vector = torch.randn(T, N), torch.randn(N)
    run = OPERATORS[name]
    torch.manual_seed(0)
    want = gradients(run)(x, vector)

    torch.compiler.reset()  # all operators are compiled as one function, which has a limit

    def loss(x, vector):
        return run(x, vector)

    torch.compiler.reset()  # of one function it compiles eight forms
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    for got, expected in zip(gradients(compiled)(x, vector), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_on_a_cpu(name):
    for func, args in operator_calls(name):
        torch.library.opcheck(func, tuple(args), test_utils=("test_schema", "test_faketensor"))
