"""Which configuration a launch runs in: keys, tables, measurements; and that the choice decides the last bits."""

import itertools
import json
import warnings

import pytest
import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from triton.errors import TritonError

from ds_stacking.kernels import _launch, add_layer_norm, attention
from ds_stacking.kernels._launch import Executor, describe, executing, executor, recording, use
from ds_stacking.kernels.cases import CASES
from ds_stacking.kernels.tiles import compare_on_device, measuring, needed
from tests.kernels.test_operators import OPERATORS, gradients


@pytest.fixture(autouse=True)
def nothing_given():
    """Each test begins and ends without choices."""
    use({})
    yield
    use({})


def attend(tokens, longest, *, causal=False, dropout=0.0, dtype=torch.bfloat16):
    """The launches of attention on meta tensors, forward and backward."""
    qkv = torch.empty(tokens, 3, 12, 64, dtype=dtype, device="meta", requires_grad=True)
    starts = torch.empty(tokens // longest + 1, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    with recording() as launches:
        out = attention(qkv, starts, longest, causal=causal, dropout=dropout, seed=seed)
        out.backward(torch.empty_like(out))
    return launches


def keys(launches):
    return [launch.key("sm_90") for launch in launches]


BASE = {"tokens": 32768, "longest": 512}


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 128, "longest": 128},
        {"tokens": 4096},
        {"longest": 256},
        {"causal": True},
        {"dropout": 0.1},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_what_changes_a_kernel_changes_its_key(other):
    assert not set(keys(attend(**BASE))) & set(keys(attend(**BASE | other)))


def test_what_does_not_is_one_key():
    """Dropout rates, and sizes up to the same power of two."""
    base = keys(attend(**BASE, dropout=0.1))
    assert base == keys(attend(**BASE, dropout=0.2)) == keys(attend(tokens=32768 - 1024, longest=511, dropout=0.1))
    assert "longest=512" in base[0] and "DROPOUT=True" in base[0] and "THRESHOLD" not in base[0]


def test_every_kernel_with_a_choice_knows_how_much_there_is_to_do():
    launches = [launch for case in CASES.values() for launch in case.launches()]
    chosen = {launch.kernel.name: launch.kernel for launch in launches if len(launch.candidates("sm_90")) > 1}
    assert len(chosen) > 5
    assert [name for name, kernel in chosen.items() if not {"rows", "tokens"} & set(kernel.key)] == []


def test_names_of_kernels_differ():
    found = {id(launch.kernel): launch.kernel for case in CASES.values() for launch in case.launches()}
    assert len({kernel.name for kernel in found.values()}) == len(found) > 10


def test_a_choice_comes_from_what_was_given_then_the_table_then_the_prediction(tmp_path, monkeypatch):
    (launch, *_) = attend(**BASE)
    key, found = launch.key("sm_90"), launch.candidates("sm_90")
    assert _launch.choose(launch, "sm_90") is not None and describe(_launch.choose(launch, "sm_90")) == describe(
        found[0]
    )
    table = tmp_path / "measured.json"
    by_device = {"Z GPU, Triton 3": {key: describe(found[1])}, "A GPU, Triton 3": {key: describe(found[0])}}
    table.write_text(json.dumps(by_device))
    monkeypatch.setattr(_launch, "MEASURED", table)
    _launch._measured.cache_clear()
    try:
        use({})
        for device in ("Z GPU", "A GPU"):  # what was measured on a device of this name goes before that of others
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
            _launch._measured.cache_clear()
            use({})
            assert describe(_launch.choose(launch, "sm_90")) == by_device[f"{device}, Triton 3"][key]
        use({key: describe(found[2])})
        assert describe(_launch.choose(launch, "sm_90")) == describe(found[2])
        assert describe(_launch.choose(launch, "sm_80")) == describe(launch.candidates("sm_80")[0])  # another target
    finally:
        _launch._measured.cache_clear()


def test_the_committed_table_names_candidates():
    """What it holds of the cases' launches; it is empty while nothing was measured."""
    for choices in json.loads(_launch.MEASURED.read_text()).values():
        for case in CASES.values():
            for launch in case.launches():
                for target in case.targets:
                    chosen = choices.get(launch.key(target))
                    assert chosen is None or chosen in map(describe, launch.candidates(target))


def test_a_choice_that_is_no_candidate_any_more_is_said_once():
    (launch, *_) = attend(**BASE)
    use({launch.key("sm_90"): "BLOCK_M=7 warps=1 stages=1"})
    with pytest.warns(UserWarning, match="'BLOCK_M=7 .*' is no candidate any more; BLOCK_M="):
        config = _launch.choose(launch, "sm_90")
    assert describe(config) == describe(launch.candidates("sm_90")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _launch.choose(launch, "sm_90")


def test_compiled_code_holds_the_choice():
    """A graph that torch.compile traces on a GPU launches in the chosen configuration, without an autotuner's run."""
    (launch, *_) = attend(**BASE)
    for config in launch.candidates("sm_90"):
        use({launch.key("sm_90"): describe(config)})
        with FakeTensorMode(), torch.no_grad():
            qkv = torch.empty(BASE["tokens"], 3, 12, 64, dtype=torch.bfloat16, device="cuda")
            starts = torch.empty(BASE["tokens"] // BASE["longest"] + 1, dtype=torch.int32, device="cuda")
            arguments = (qkv, starts, None, None, BASE["longest"], False, False, 0.125, 0.0)
            graph = make_fx(dispatch_functionalize(torch.ops.ds_stacking.attention.default))(*arguments).graph
        (node,) = (node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target))
        (traced,) = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).configs
        constants = {**node.kwargs["kwargs"], **kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])}
        assert (traced.num_warps, traced.num_stages) == (config.num_warps, config.num_stages)
        assert {name: constants[name] for name in config.kwargs} == config.kwargs


def test_the_table_is_in_the_package():
    from tests.test_house import ROOT

    assert '"measured_tiles.json"' in (ROOT / "setup.py").read_text() and _launch.MEASURED.is_file()


class Runs(Executor):
    """Carries launches out by another executor, and keeps in which configuration each ran."""

    def __init__(self, inner, refused=()):
        self.inner, self.everywhere, self.one_by_one = inner, inner.everywhere, inner.one_by_one
        self.refused = refused
        self.ran = []

    def target(self, launch):
        return self.inner.target(launch)

    def run(self, launch, config):
        if config.num_warps in self.refused:
            raise triton.runtime.errors.OutOfResources(300, 227, "shared memory")
        self.ran.append((launch.key("sm_90"), describe(config)))
        self.inner.run(launch, config)


def norm(rows=6):
    x, vector = torch.randn(rows, 64), torch.randn(64)
    return add_layer_norm(x, vector, vector)


def in_order_of(wanted):
    """Stands in for the clock: the run number `wanted` is the fastest. Each is run twice."""

    def compare(runs):
        for run in [*runs, *runs]:
            run()
        return [abs(number - wanted) + 1.0 for number in range(len(runs))]

    return compare


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_the_fastest_is_found_and_runs_from_then_on(kernels, wanted):
    with kernels(), executing(Runs(executor())) as runs:
        with measuring(in_order_of(wanted)) as found:
            want = norm()
            assert len(found) == 1
            (key, chosen), *_ = found.items()
            assert len(runs.ran) == 3 + 2 * 3 + 1  # each once, twice for the clock, then the winner
            norm()  # the same key: nothing is measured again
            assert len(runs.ran) == 11
        use(found)
        norm()
        assert runs.ran[-3:] == [(key, chosen)] * 3
        with measuring(in_order_of(0)) as again:
            norm()
        assert again == {} and len(runs.ran) == 13  # what is known is not measured
    assert want.shape == (6, 64)


def test_nothing_is_measured_where_nobody_asks(kernels):
    with kernels(), executing(Runs(executor())) as runs:
        norm()
    assert len(runs.ran) == 1


def test_a_candidate_that_the_device_refuses_is_dropped(kernels):
    with kernels(), executing(Runs(executor(), refused=(4,))), measuring(in_order_of(0)) as found:
        norm()
    assert list(found.values()) == ["ROWS=64 STAGES=1 warps=8 stages=3"]
    with kernels(), executing(Runs(executor(), refused=(4, 8))), measuring(), pytest.raises(TritonError):
        norm()


def test_what_will_be_needed_is_known_without_running_it(kernels):
    def run(device):
        x, vector = torch.randn(6, 64, device=device), torch.randn(64, device=device)
        add_layer_norm(x, vector, vector)

    expected = needed(lambda: run("meta"), torch.device("cpu"))
    with kernels(), measuring(in_order_of(0)) as found:
        run("cpu")
    assert expected == found and len(found) == 1
    use(found)
    assert needed(lambda: run("meta"), torch.device("cpu")) == {}


class Repeating(Executor):
    """Makes each launch that has a choice three times, as a measurement does."""

    def __init__(self, inner):
        self.inner, self.everywhere, self.one_by_one = inner, inner.everywhere, inner.one_by_one

    def target(self, launch):
        return self.inner.target(launch)

    def run(self, launch, config):
        for _ in range(3 if len(launch.candidates("sm_90")) > 1 else 1):
            self.inner.run(launch, config)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_kernel_with_a_choice_may_be_repeated(kernels, name):
    """It adds to no output and works on nothing in place: forward and backward are the same to the bit."""

    def results():
        torch.manual_seed(0)
        return gradients(OPERATORS[name])(torch.randn(32, 64), torch.randn(64))

    with kernels():
        once = results()
        with executing(Repeating(executor())):
            thrice = results()
    for a, b in zip(once, thrice, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


class Device:
    """Stands in for torch.cuda: keeps the order of what is asked for; the run `slow` takes a millisecond more."""

    L2_cache_size = 1 << 20

    def __init__(self):
        self.asked, self.clock = [], 0.0

    def Event(self, enable_timing):
        return Moment(self)

    def _sleep(self, cycles):
        self.asked.append("spin")
        self.clock += cycles / 1e6

    def zeros(self, size, dtype, device):
        assert device == "cuda" and size >= 4 * self.L2_cache_size
        return self

    def view(self, dtype):
        return self

    def sum(self):
        self.asked.append("read")
        self.clock += 0.1

    def run(self, name, milliseconds):
        self.asked.append(name)
        self.clock += next(milliseconds)


class Moment:
    """An event of the stand-in."""

    def __init__(self, device):
        self.device = device

    def record(self):
        self.device.asked.append("record")
        self.at = self.device.clock

    def synchronize(self): ...

    def elapsed_time(self, end):
        return end.at - self.at


def test_candidates_are_timed_behind_a_spin_in_turns(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "zeros", device.zeros)
    for name in ("Event", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    once = itertools.chain([50.0], itertools.repeat(2.0))  # an outlier is no median
    times = compare_on_device([lambda: device.run("a", once), lambda: device.run("b", itertools.repeat(3.0))])
    assert times == pytest.approx([0.002, 0.003])
    turn = ["read", "spin", "record", "a", "record", "read", "spin", "record", "b", "record"]
    assert device.asked == turn * (len(device.asked) // len(turn)) and len(device.asked) > 5 * len(turn)


def test_what_is_recorded_without_a_gpu_is_what_an_h100_launches():
    """Whole heads where these are many, not where one multiprocessor would be busy with them."""
    names = {tokens: [launch.kernel.name for launch in attend(tokens, 512)] for tokens in (512, 32768)}
    assert any("backward_queries" in name for name in names[512]), names
    assert any("backward_heads" in name for name in names[32768]), names
