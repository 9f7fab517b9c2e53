"""A double of a GPU: the real code runs on CPUs, sees `cuda:<rank>`, and whatever CUDA or NCCL would refuse raises.

    with strict_device(rank) as gpu:
        ...                             # engines, growth, training
    gpu.waits                           # where the host waited for the device

It stands in three places: a function mode answers what Python asks of tensors (`device`, `to`, `numpy`, factories), a
dispatch mode watches every operation and collective beneath (also those of the backward pass), and an accelerator
takes the place of DeepSpeed's. Streams and events do nothing. What C++ does by itself on raw data is not seen.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device_strict.labels import HOST, Labels, Refused, tensors_in

ROOT = str(Path(__file__).parents[2])


class Gpu:
    """What the double knows: labels, the current device, and where the host waited."""

    def __init__(self, index: int) -> None:
        self.labels = Labels()
        self._current = threading.local()
        self.index = index
        self.waits: list[str] = []

    @property
    def index(self) -> int:
        """The calling thread's current device; a new thread begins with the first one."""
        return getattr(self._current, "index", 0)

    @index.setter
    def index(self, index: int) -> None:
        self._current.index = index

    def wait(self, what: str) -> None:
        """Note a wait of the host for the device, and whose line it is: the project's or DeepSpeed's innermost one."""
        for frame in reversed(traceback.extract_stack()):
            for owner, folder in (("ours", f"{ROOT}/ds_stacking/"), ("DeepSpeed", "/deepspeed/")):
                if folder in frame.filename:
                    self.waits.append(f"{owner}: {what} in {Path(frame.filename).name}:{frame.lineno}")
                    return
        self.waits.append(f"others: {what}")

    def target(self, where: Any) -> int:
        """The label that a `device` argument means."""
        if isinstance(where, int):
            return where
        where = torch.device(where)
        return HOST if where.type == "cpu" else self.index if where.index is None else where.index

    def device_of(self, tensor: Tensor) -> torch.device:
        """What `tensor.device` is."""
        index = self.labels.of(tensor)
        return tensor.device if index == HOST else torch.device("cuda", index)  # meta, or the host

    def moved(self, tensor: Tensor, result: Tensor, index: int, *, blocking: bool) -> Tensor:
        """`result`, made from `tensor` by a conversion, in the memory of `index`."""
        here = self.labels.of(tensor)
        if here == index:
            return self.labels.set(result, index)
        if result.data_ptr() == tensor.data_ptr():
            result = result.clone()
        pinned = self.labels.is_pinned(tensor)
        if index == HOST or blocking or not pinned:
            self.wait(f"copy {'to' if index == HOST else 'from'} the host")
        return self.labels.set(result, index)


class _Operations(TorchDispatchMode):
    """Every operation that reaches a kernel."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, labels = kwargs or {}, self.gpu.labels
        if "device" in kwargs and kwargs["device"] is not None and kwargs["device"].type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}  # asked for in C++, by `new_tensor` for one
        index = labels.check(func, args, kwargs)
        name = func._schema.name
        inputs = list(tensors_in((args, kwargs)))
        if name == "aten::_local_scalar_dense" and index != HOST:
            self.gpu.wait("item")
        if name == "aten::copy_" and labels.of(args[0]) != labels.of(args[1]):
            non_blocking = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) is True
            other = args[1] if labels.of(args[0]) != HOST else args[0]
            if not (non_blocking and labels.is_pinned(other)):
                self.gpu.wait("copy_")
        if name in ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim") and index != HOST:
            self.gpu.wait(name.removeprefix("aten::"))
        result = func(*args, **kwargs)
        labels.spread(inputs, result, index)
        return result


class _Python(TorchFunctionMode):
    """What Python asks of tensors before an operation is reached."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.answers: dict[Any, Callable] = {
            Tensor.device.__get__: gpu.device_of,
            Tensor.is_cuda.__get__: lambda t: gpu.labels.of(t) != HOST,
            Tensor.is_cpu.__get__: lambda t: t.is_cpu and gpu.labels.of(t) == HOST,
            Tensor.get_device: lambda t: gpu.labels.of(t),
            Tensor.grad.__set__: self._set_grad,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._array,
            Tensor.cpu: lambda t, *a, **k: self._to(t, torch.device("cpu")),
            Tensor.cuda: lambda t, device=None, non_blocking=False: self._to(
                t, torch.device("cuda") if device is None else device, non_blocking=non_blocking
            ),
            Tensor.to: self._to,
            Tensor.pin_memory: self._pin,
            Tensor.is_pinned: lambda t, *a: gpu.labels.is_pinned(t),
            Tensor.new_tensor: self._new_tensor,
            Tensor.__deepcopy__: lambda t, memo: gpu.labels.set(Tensor.__deepcopy__(t, memo), gpu.labels.of(t)),
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        if kwargs.get("pin_memory"):
            return self._pinned_factory(func, args, kwargs)
        where = kwargs.get("device")
        if where is None or torch.device(where).type == "meta":
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": "cpu"})
        source = next(tensors_in(args), None)
        if source is not None and made.data_ptr() == source.data_ptr() and made.numel():
            return self.gpu.moved(source, made, self.gpu.target(where), blocking=True)
        return self.gpu.labels.set(made, self.gpu.target(where))

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = dict(kwargs)
        rest = list(args)
        if rest and isinstance(rest[0], Tensor):
            like = rest.pop(0)
            named |= {"device": self.gpu.device_of(like), "dtype": like.dtype}
        elif rest and (rest[0] is None or isinstance(rest[0], str | int | torch.device)):
            named["device"] = rest.pop(0)
        if rest and "dtype" not in named:
            named["dtype"] = rest.pop(0)
        named |= dict(zip(("non_blocking", "copy"), rest, strict=False))
        where = named.pop("device", None)
        if tensor.is_meta or (where is not None and torch.device(where).type == "meta"):
            return tensor.to(*args, **kwargs)
        index = self.gpu.labels.of(tensor) if where is None else self.gpu.target(where)
        result = tensor.to(**{key: value for key, value in named.items() if value is not None})
        return self.gpu.moved(tensor, result, index, blocking=not named.get("non_blocking"))

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        if self.gpu.labels.of(tensor) != HOST:
            raise Refused("cannot pin a tensor of the device: only dense CPU tensors can be pinned")
        return tensor if self.gpu.labels.is_pinned(tensor) else self.gpu.labels.pin(tensor.clone())

    def _pinned_factory(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        source = next(tensors_in(args), None)
        where = self.gpu.target(kwargs["device"]) if kwargs.get("device") is not None else HOST
        on_device = kwargs.get("device") is None and source is not None and self.gpu.labels.of(source) != HOST
        if where != HOST or on_device:
            raise Refused("cannot pin memory of the device: only dense CPU tensors can be pinned")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "device")}
        return self.gpu.labels.pin(self.gpu.labels.set(func(*args, **kwargs), HOST))

    def _new_tensor(self, tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        where = kwargs.pop("device", None)
        index = self.gpu.labels.of(tensor) if where is None else self.gpu.target(where)
        return self.gpu.labels.set(tensor.new_tensor(data, **kwargs), index)

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu.labels.of(tensor) != HOST:
            raise Refused("can't convert cuda device type tensor to numpy; use Tensor.cpu() first")
        return tensor.numpy(*args, **kwargs)

    def _array(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._numpy(tensor)

    def _set_grad(self, tensor: Tensor, value: Tensor | None) -> None:
        if value is not None and self.gpu.labels.of(value) != self.gpu.labels.of(tensor):
            raise Refused("assigned grad has data located on a different device")
        tensor.grad = value


class _Stream:
    """A stream or event on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        """Nothing is pending."""
        return True

    def elapsed_time(self, _: Any) -> float:
        """Milliseconds."""
        return 0.0

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    record = wait = record_event = wait_event = wait_stream = _nothing


def _stream_type(gpu: Gpu, what: str) -> type[_Stream]:
    return type("Stream", (_Stream,), {"synchronize": lambda self: gpu.wait(f"{what} synchronized")})


class _Accelerator(CPU_Accelerator):
    """DeepSpeed's view of the double: its CUDA accelerator's answers."""

    _torch_pins_host_memory = True
    Stream = Event = _Stream

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.Stream, self.Event = _stream_type(gpu, "stream"), _stream_type(gpu, "event")
        self._name = "cuda"

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("cuda", device_index)

    def set_device(self, device_index: int | torch.device) -> None:
        self.gpu.index = self.gpu.target(device_index)

    def current_device(self) -> int:
        return self.gpu.index

    def current_device_name(self) -> str:
        return f"cuda:{self.gpu.index}"

    def synchronize(self, device_index: int | None = None) -> None:
        self.gpu.wait("device synchronized")

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> _Stream:
        return self.Stream()

    default_stream = current_stream

    def on_accelerator(self, tensor: Tensor) -> bool:
        return self.gpu.labels.of(tensor) != HOST

    def is_pinned(self, tensor: Tensor) -> bool:
        return self.gpu.labels.is_pinned(tensor)

    def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
        return tensor.pin_memory()

    def _torch_empty_pinned(self, tensor: Tensor, shape: Any) -> Tensor:
        return self.gpu.labels.pin(self.gpu.labels.set(torch.empty(shape, dtype=tensor.dtype), HOST))

    def _typed(self, dtype: torch.dtype) -> Callable:
        return lambda data: torch.tensor(data, dtype=dtype, device=self.current_device_name())

    BFloat16Tensor = property(lambda self: self._typed(torch.bfloat16))
    ByteTensor = property(lambda self: self._typed(torch.uint8))
    DoubleTensor = property(lambda self: self._typed(torch.float64))
    FloatTensor = property(lambda self: self._typed(torch.float32))
    HalfTensor = property(lambda self: self._typed(torch.float16))
    IntTensor = property(lambda self: self._typed(torch.int32))
    LongTensor = property(lambda self: self._typed(torch.int64))


def _cuda(gpu: Gpu) -> dict[str, Any]:
    """What of `torch.cuda` the code calls."""
    generator: list[Tensor] = [torch.zeros(16, dtype=torch.uint8)]

    def set_state(state: Tensor, device: Any = None) -> None:
        assert gpu.labels.of(state) == HOST, "a generator's state is a host tensor"
        generator[0] = state.clone()

    stream, event = _stream_type(gpu, "stream"), _stream_type(gpu, "event")
    return {
        "is_available": lambda: True,
        "current_device": lambda: gpu.index,
        "set_device": lambda index: setattr(gpu, "index", gpu.target(index)),
        "synchronize": lambda *_: gpu.wait("device synchronized"),
        "current_stream": lambda *_: stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "Stream": stream,
        "Event": event,
        "get_device_name": lambda *_: "double of a GPU",
        "get_rng_state": lambda *_: generator[0].clone(),
        "set_rng_state": set_state,
        "manual_seed_all": lambda *_: None,
        "manual_seed": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 36, major=9, minor=0),
        "mem_get_info": lambda *_: (1 << 36, 1 << 36),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
    }


@contextlib.contextmanager
def strict_device(index: int) -> Iterator[Gpu]:
    """This process has a GPU of number `index`, in every thread that begins inside. Nothing of it stays afterwards."""
    gpu = Gpu(index)
    run, differentiate = threading.Thread.run, torch.autograd._engine_run_backward

    def watched(thread: threading.Thread) -> None:
        with _Operations(gpu), _Python(gpu):
            run(thread)

    def backward(tensors: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None and gpu.labels.of(gradient) != gpu.labels.of(tensor):
                raise Refused("the gradient to begin with lies on another device than the tensor")
        with _Python(gpu):  # torch turned the mode off for its own function; the hooks that it calls need it
            return differentiate(tensors, gradients, *args, **kwargs)

    before = real_accelerator.ds_accelerator
    with contextlib.ExitStack() as stack:
        for name, value in _cuda(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(threading.Thread, "run", watched))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        real_accelerator.ds_accelerator = _Accelerator(gpu)
        stack.callback(setattr, real_accelerator, "ds_accelerator", before)
        stack.enter_context(_Operations(gpu))
        stack.enter_context(_Python(gpu))
        yield gpu
