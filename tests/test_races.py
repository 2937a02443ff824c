"""What runs at once: programs of a kernel in any order, threads at one cache, processes at one run folder."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from datasets import Dataset

from lsr_scale import UserError, files
from lsr_scale.data import cache
from lsr_scale.kernels import (
    cross_entropy,
    dequantize,
    output_gradients,
    rms_norm,
    rms_norm_project,
    rotary,
    swiglu,
    swiglu_pair_gradients,
    swiglu_project,
)
from lsr_scale.run.folder import RunFolder
from lsr_scale.run.lock import locked
from lsr_scale.run.start import claim
from tests.kernels import (
    rms_norm_inputs,
    swiglu_inputs,
    test_cross_entropy,
    test_dequantize,
    test_output_gradients,
    test_rotary,
    test_swiglu_pair_gradients,
    test_swiglu_project,
)
from tests.kernels.checks import poisoned, strided

# Kernels. Each function takes a number of rows, a width, and where and in which dtype; it returns what launches a
# kernel, into new memory full of NaN, and returns all that it wrote.


def norm_both_ways(rows, width, dtype, device):
    x, weight, residual, grad, residual_grad = rms_norm_inputs.inputs((rows, width), dtype, device)

    def launch():
        out, total, found = (poisoned(x.shape, dtype, device) for _ in range(3))
        rstd = rms_norm.rms_norm_triton(x, weight, 1e-5, out, residual=residual, residual_out=total)
        rms_norm.rms_norm_backward_triton(grad, total, weight, rstd, found, residual_grad=residual_grad)
        return out, total, rstd, found

    return launch


def norm_and_projection(rows, width, dtype, device):
    x, weight, residual, *_ = rms_norm_inputs.inputs((rows, width), dtype, device)
    down = rms_norm_inputs.inputs((64, width), dtype, device, seed=1)[0]
    down[48:] = 0

    def launch():
        out, total = poisoned((rows, width + 64), dtype, device), poisoned(x.shape, dtype, device)
        xa = poisoned((rows, 64), dtype, device)
        given = {"rank": 48, "residual": residual, "residual_out": total}
        rstd = rms_norm_project.rms_norm_project_triton(x, weight, 1e-5, out, down, xa, **given)
        return out, total, xa, rstd

    return launch


def rotation(rows, width, dtype, device):
    _, x = test_rotary.heads_of(rows, 4, 64, dtype, device, extra=24)
    cos, sin = test_rotary.tables(rows, 64, torch.float32, device)

    def launch():
        out, place = poisoned(x.shape, dtype, device), x.clone()
        rotary.rotate_triton(x, cos, sin, out, inverse=True)
        rotary.rotate_triton(place, cos, sin, place)
        return out, place

    return launch


def gates_both_ways(rows, width, dtype, device):
    gate_up = swiglu_inputs.randn(rows, 2 * width, dtype=dtype, device=device, scale=2.0)
    grad = swiglu_inputs.randn(rows, width, dtype=dtype, device=device, seed=1)

    def launch():
        out, h, in_place = poisoned(grad.shape, dtype, device), grad.clone(), gate_up.clone()
        swiglu.swiglu_triton(gate_up, out)
        swiglu.swiglu_backward_triton(h, in_place, in_place, h)
        return out, h, in_place

    return launch


def gates_with_pairs(rows, width, dtype, device):
    arguments = test_swiglu_pair_gradients.adapter_case(rows, width, (0, 16), (16, 16), 16, dtype, device, 64)

    def launch():
        out = poisoned((rows, 2 * width), dtype, device)
        return out, *swiglu_pair_gradients.swiglu_pair_gradients_triton(*arguments, out)

    return launch


def gates_and_projection(rows, width, dtype, device):
    gate_up, down = test_swiglu_project.inputs(rows, width, 64, 16, dtype, device)

    def launch():
        out, xa = poisoned((rows, width + 64), dtype, device), poisoned((rows, 64), dtype, device)
        swiglu_project.swiglu_project_triton(gate_up, out, down, xa, rank=16)
        return out, xa

    return launch


def gradients_of_outputs(rows, width, dtype, device):
    sizes = [width, 64, 64]
    grad, ds_out, xa, up, offsets = test_output_gradients.case(rows, sizes, [16, 16, 16], 64, dtype, device)
    up[:, 48:] = 0
    xa[:, 48:] = 0

    def launch():
        ds_out.fill_(math.nan)
        ds, d_up = output_gradients.output_gradients_triton(grad, xa, up, offsets, 16, ds_out=ds_out)
        return ds.clone(), d_up

    return launch


def weights(rows, width, dtype, device):
    packed, state, _ = test_dequantize.quantized(rows, width, 64, "nf4", True, dtype, device)
    codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=device)
    scales = torch.rand(rows, device=device)
    up, down = (strided(torch.randn(size, device=device), 3) for size in ((rows, 16), (16, width)))

    def launch():
        outs = [poisoned((rows, width + 64), dtype, device) for _ in range(4)]
        downs = [poisoned((64, width), dtype, device) for _ in range(4)]
        pairs = [dequantize.Extension(up, 48, down, down_out) for down_out in downs]
        known = test_dequantize.arguments(state)
        dequantize.dequantize_4bit_triton(packed, out=outs[0], **known, extension=pairs[0])
        dequantize.dequantize_int8_triton(codes, scales, outs[1], extension=pairs[1])
        dequantize.dequantize_int8_triton(up.new_ones(rows, width).to(dtype), None, outs[2], extension=pairs[2])
        dequantize.fill_extension_triton(outs[3][:, width:], pairs[3])
        return *outs, *downs

    return launch


def losses(rows, width, dtype, device):
    _, logits, labels = test_cross_entropy.inputs(rows, width, dtype, device)

    def launch():
        in_place = logits.clone()
        return cross_entropy.cross_entropy_triton(in_place, labels, gradient=True), in_place

    return launch


KERNELS = [norm_both_ways, norm_and_projection, rotation, gates_both_ways, gates_with_pairs, gates_and_projection]
KERNELS += [gradients_of_outputs, weights, losses]


def bits(tensors):
    """Return copies of tensors as bytes, so that NaN equals NaN."""
    return [tensor.detach().contiguous().clone().view(torch.uint8) for tensor in tensors]


def differing(one, other):
    """Return the places of the tensors that differ in a bit."""
    return [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)]


@contextlib.contextmanager
def programs_in(order):
    """Have Triton's interpreter run the programs of each launch in an order; yield how many each launch had.

    Args:
        order: Takes a program's turn and the number of programs, and returns which program has it.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    counts: list[int] = []
    set_index, set_grid = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim

    def set_index_by_turn(self, x, y, z):
        _, ny, nz = self.grid_dim
        program = order((x * ny + y) * nz + z, math.prod(self.grid_dim))
        set_index(self, program // (ny * nz), program // nz % ny, program % nz)

    def set_grid_and_count(self, *sizes):
        set_grid(self, *sizes)
        counts.append(math.prod(self.grid_dim))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", set_index_by_turn)
        patch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_and_count)
        yield counts


ORDERS = {
    "as they are": lambda turn, number: turn,
    "backwards": lambda turn, number: number - 1 - turn,
    "mixed": lambda turn, number: (turn * 7919 + 3) % number if number % 7919 else turn,
}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@interpreted
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_programs_of_a_kernel_give_the_same_bits_in_any_order(kernel):
    pytest.importorskip("triton", reason="Triton is not installed")
    # tl.dot of bfloat16 gives garbage in the interpreter
    launch = kernel(70, 128, torch.float16, "cpu")
    found = {}
    for name, order in ORDERS.items():
        with programs_in(order) as counts:
            found[name] = bits(launch())
        assert max(counts) > 1, "one program cannot race"
    for name in ("backwards", "mixed"):
        assert differing(found["as they are"], found[name]) == [], f"programs {name}"


@interpreted
def test_a_race_is_seen_by_the_order_of_programs():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    import triton.language as tl

    @triton.jit
    def racing(out):
        tl.store(out, tl.program_id(0))

    found = []
    for order in ORDERS.values():
        out = torch.zeros(1, dtype=torch.int32)
        with programs_in(order):
            racing[(5,)](out)
        found.append(int(out))
    assert found[:2] == [4, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_a_hundred_launches_of_a_kernel_give_equal_bits(kernel, dtype):
    launch = kernel(2048, 4096, dtype, "cuda")
    first = bits(launch())
    # other work moves programs to other multiprocessors and moments
    other = torch.cuda.Stream()
    square = torch.randn(2048, 2048, device="cuda")
    for number in range(100):
        if number % 2:
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                square = torch.tanh(square @ square)
        assert differing(first, bits(launch())) == [], f"launch {number}"


# Processes at one folder


def in_processes(number, work):
    """Return what `work(index, barrier)` returns in each of so many processes, which begin together."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(number), context.SimpleQueue()

    def run(index):
        try:
            barrier.wait()
            results.put((index, work(index, barrier)))
        except BaseException as error:
            results.put((index, f"{type(error).__name__}: {error}"))
            barrier.abort()
        finally:
            os._exit(0)

    started = [context.Process(target=run, args=(index,)) for index in range(number)]
    for process in started:
        process.start()
    found = dict(results.get() for _ in started)
    for process in started:
        process.join()
    return [found[index] for index in range(number)]


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def test_one_process_at_a_time_holds_a_run_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()

    def work(index, barrier):
        entered = 0
        while entered < 30:
            with contextlib.suppress(UserError), locked(folder.path):
                os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))  # fails if somebody else is
                os.sched_yield()
                os.unlink(tmp_path / "inside")
                entered += 1
        return entered

    assert in_processes(4, work) == [30] * 4
    assert not (folder.path / ".lock").exists()


def test_of_runs_that_start_in_one_folder_at_once_one_wins_and_the_others_are_told(tmp_path):
    def work(index, barrier):
        with ExitStack() as claims:
            try:
                claims.enter_context(claim(str(tmp_path / "run"), "arc", resume=False, overwrite=False))
                return "it runs"
            except UserError as error:
                return str(error).partition(" (")[0]
            finally:
                barrier.wait()  # the winner goes on until all have tried

    found = in_processes(5, work)
    assert found.count("it runs") == 1
    assert found.count(f"{tmp_path}/run: a run is under way here") == 4


def test_runs_that_start_at_once_without_a_folder_each_get_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work(index, barrier):
        with claim(None, "arc", resume=False, overwrite=False) as folder:
            barrier.wait()
            return folder.path.name

    assert sorted(in_processes(5, work)) == ["arc", "arc-2", "arc-3", "arc-4", "arc-5"]


def test_nobody_reads_half_a_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"rows": [0] * 3000})

    def work(index, barrier):
        for turn in range(150):
            if index:
                rows = json.loads(path.read_text())["rows"]
                if len(rows) != 3000 or len(set(rows)) != 1:
                    return f"{len(rows)} rows of {set(rows)}"
            else:
                files.write_json(path, {"rows": [turn] * 3000})
        return "read"

    assert in_processes(3, work) == ["read"] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"], "nothing is left beside it"


# Threads at one cache


@pytest.fixture
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LSR_SCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MIN_ROWS", 1)
    return tmp_path / "datasets"


def together(number, work):
    """Return what `work(index)` returns in each of so many threads, which begin together."""
    barrier = threading.Barrier(number)

    def run(index):
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def test_datasets_that_are_cached_at_once_are_each_there_whole(small_cache):
    for turn, same in itertools.product(range(4), (True, False)):
        datasets = [Dataset.from_dict({"n": list(range(turn, turn + 50 + (0 if same else i)))}) for i in range(6)]
        found = together(6, lambda index, given=datasets: cache.cached(given[index]))
        for one, given in zip(found, datasets, strict=True):
            assert one.to_dict() == given.to_dict()
            assert one.cache_files, "it lies in the cache, where the tokens are cached beside it"
    assert not [path.name for path in small_cache.iterdir() if path.name.startswith(".")], "nothing half is left"


def test_rows_are_tokenized_into_one_cache_entry_by_threads_that_start_together(small_cache):
    dataset = cache.cached(Dataset.from_dict({"n": list(range(400))}))

    def tokenize(index):
        return dataset.map(lambda row: {"ids": [row["n"]] * 3}, new_fingerprint="tokens").to_dict()["ids"]

    expected = [[n] * 3 for n in range(400)]
    for found in together(4, tokenize):
        assert found == expected
    folder = next(small_cache.iterdir())
    assert len([file for file in folder.iterdir() if file.name.startswith("cache-")]) == 1
    assert not [file.name for file in folder.iterdir() if file.name.startswith("tmp")]
