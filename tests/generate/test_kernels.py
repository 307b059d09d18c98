"""The CPU kernels against plain torch: every path that this processor can run, every weight format, every
kind of row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir
from numba import njit, typeof

from chatwright.config import UserError
from chatwright.generate.kernels import (
    KernelRunner,
    attention,
    compiling,
    dots,
    layout,
    packing,
    paths,
    simd,
    step,
)
from chatwright.generate.kernels.products import (
    ADDS,
    BF16_WEIGHTS,
    BIAS,
    FORMAT,
    GROUPS,
    INT4_WEIGHTS,
    INT8_WEIGHTS,
    TILES,
    product,
    quantise,
    takes_words,
)
from chatwright.generate.kernels.reference import reference, reference_logits, rounded_activations
from chatwright.generate.runner import Feed
from chatwright.machine_load import LoadMeter
from chatwright.model.gpt import GPT

MakeModel = Callable[..., GPT]
DTYPES = ("fp32", "bf16", "int8", "int4")
SHAPES = {
    "qwen": {"heads": 4, "kv_heads": 2},
    "llama": {"qk_norm": False, "tied": True, "vocab_size": 515},
    "gpt2": {
        "preset": "gpt2",
        "layers": 2,
        "width": 104,
        "heads": 4,
        "context": 96,
        "vocab_size": 515,
        "tied": True,
    },
    "relu2": {"activation": "relu2", "heads": 1, "kv_heads": 1, "head_dim": 40, "mlp_width": 100},
}
BOUND = {"fp32": 3e-5, "bf16": 2e-2, "int8": 0.4, "int4": 0.4}
"""Largest distance of a logit, where logits spread by about 3. When sums are added in another order, a key or
a value may fall to the other of two neighbouring bfloat16 numbers, and an activation, from the second block
on, to the other of two whole ones; random weights make much of that. In a single block few sums come before a
rounding: there most positions are held to the strict bound."""
STRICT = {"fp32": 5e-5, "bf16": 5e-5, "int8": 4e-3, "int4": 5e-5}
"""int8 has activations of 16 bits: so fine that sums in another order do not all fall to the same whole
numbers."""
ROUNDED = 0.1
"""BOUND for bf16 where activations become bfloat16 as well."""


def shape(make_model: MakeModel, name: str, **more: Any) -> GPT:
    changes = {**SHAPES[name], **more}
    return make_model(str(changes.pop("preset", "modern-nano")), **changes)


def runner(model: GPT, dtype: str, *, threads: int = 2, path: str | None = None) -> KernelRunner:
    made = KernelRunner(model, dtype, threads=threads, path=path)
    made.allocate(16, 16)
    return made


def missing(path: str) -> str | None:
    return (
        None
        if path in paths.possible()
        else f"this processor cannot run the {path} path: it is NOT covered here"
    )


@njit
def _both_dots(path, weights, wide, narrow, out):  # type: ignore[no-untyped-def]
    words, offsets = np.zeros(256, np.uint8), np.zeros(4, np.float32)
    for row in range(4):
        for half in range(2):
            dots.store_words(path, words, 64 * row, half, simd.rounded(simd.load(wide, 32 * row + 16 * half)))
        simd.store_int(offsets, row, -128 * np.int64(wide[32 * row : 32 * row + 32].sum()))
    simd.store(out, 0, simd.to_float(dots.dots8(path, weights, 0, words, offsets, 0, 1)[0]))
    simd.store(out, 16, simd.to_float(dots.dots4(path, weights, 0, narrow, 0, 1)[0]))
    # Four rows, the first of which is that one.
    a, b, c, d = dots.four_dots8(path, weights, 0, words, offsets, 0, 1)
    for number, sums in enumerate((a, b, c, d)):
        simd.store(out, 32 + 16 * number, simd.to_float(sums))
    a, b, c, d = dots.four_dots4(path, weights, 0, narrow, 0, 1)
    for number, sums in enumerate((a, b, c, d)):
        simd.store(out, 96 + 16 * number, simd.to_float(sums))


@pytest.mark.parametrize("path", paths.NAMES)
def test_integer_products_are_exact(path: str) -> None:
    if reason := missing(path):
        pytest.skip(reason)
    rng = np.random.default_rng(0)

    def draw(limit: int, size: int, extreme: bool) -> np.ndarray:
        return rng.choice([-limit, limit], size) if extreme else rng.integers(-limit, limit + 1, size)

    for extreme in (False, True):  # at the extremes sums in fewer bits would overflow
        weights = draw(127, 512, extreme).astype(np.int8)
        wide, narrow = draw(32_512, 128, extreme).astype(np.float32), draw(127, 128, extreme).astype(np.int8)
        out = np.zeros(160, dtype=np.float32)
        _both_dots(paths.typed(path), weights.view(np.uint8), wide, narrow.view(np.uint8), out)
        packed = weights.view(np.uint8)[:256].reshape(4, 16, 4).astype(np.int64)
        unpacked = np.concatenate([packed & 15, packed >> 4])
        eights = _exact(weights.reshape(8, 16, 4), wide)
        fours = _exact(unpacked, narrow)
        assert np.array_equal(out, np.concatenate([eights[0], fours[0], *eights, *fours]))


def _exact(weights: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """(words, outputs, 4) and (rows of 32) -> (rows, outputs)."""
    words = activations.reshape(-1, 8, 4).astype(np.int64)
    return np.einsum("wok,rwk->ro", weights.astype(np.int64), words).astype(np.float32)


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("form", "triple", "processor", "features", "instruction", "times"),
    [
        (dots.DOTS8[1], X86, "haswell", "", "vpmaddwd", 32),
        (dots.DOTS8[2], X86, "icelake-server", "", "vpdpbusd", 16),
        (dots.DOTS8[3], ARM, "neoverse-n1", "+dotprod", "smull|smlal", 8 * 16),
        (dots.DOTS4[1], X86, "haswell", "", "vpmaddubsw", 16),
        (dots.DOTS4[2], X86, "icelake-server", "", "vpdpbusd", 8),
        (dots.DOTS4[3], ARM, "neoverse-n1", "+dotprod", "sdot", 32),
    ],
)
def test_paths_become_the_instructions_they_are_named_after(
    form: Any, triple: str, processor: str, features: str, instruction: str, times: int
) -> None:
    """Compiled for other processors too, which cannot run it here."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("dots")
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()] * 4), "dots")
    builder = ir.IRBuilder(function.append_basic_block())
    weights, words, out, offset = function.args
    if form in dots.DOTS8:
        (sums,) = form(builder, weights, [words], [builder.bitcast(offset, ir.IntType(32).as_pointer())])
    else:
        (sums,) = form(builder, weights, [words])
    builder.store(sums, builder.bitcast(out, sums.type.as_pointer()), align=4)
    builder.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    code = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert len(re.findall(instruction, code)) == times


@njit
def _exponentials(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, len(x), 16):
        simd.store(out, i, simd.exp(simd.load(x, i)))


def test_exponential() -> None:
    x = np.linspace(-87, 88, 16_000, dtype=np.float32)
    out = np.empty_like(x)
    _exponentials(x, out)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 3e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_read_back(dtype: str, make_model: MakeModel) -> None:
    """Each weight is off by at most half a step of its group, and a step is what the format's bits allow."""
    model = shape(make_model, "gpt2")
    packed = packing.pack(model, dtype)
    down = model.blocks[1].mlp.down.weight.detach()  # type: ignore[union-attr]
    read = packed.matrix(1 * 4 + 3)
    assert read.shape == (112, 416)
    assert not read[104:].any()
    groups = down.view(104, 13, 32)
    if dtype == "fp32":
        limit = torch.zeros(104, 13, 1)
    elif dtype == "bf16":
        limit = groups.abs() * 2**-8
    elif dtype == "int8":
        limit = (
            groups.abs().amax(-1, keepdim=True) * (0.5 + 127 * 2**-8) / 127
        )  # a scale rounded down cuts the largest
    else:  # ends may be drawn in by a tenth of the range, when that serves the others
        limit = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) * (0.5 / 15 + 0.105 + 2**-7)
    error = (read[:104].view(104, 13, 32) - groups).abs()
    assert (error <= limit).all()
    assert error.square().mean().sqrt() <= {"fp32": 0.0, "bf16": 2e-4, "int8": 8e-4, "int4": 1.1e-2}[dtype]


@pytest.mark.parametrize("path", paths.NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_plain_torch(
    name: str, layers: int, dtype: str, path: str, make_model: MakeModel
) -> None:
    """A prompt in two pieces, then token by token; every position's logits."""
    if reason := missing(path):
        pytest.skip(reason)
    model = shape(make_model, name, layers=layers)
    ids = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    run = runner(model, dtype, path=path)
    pages = [5, 0, 9]
    parts = [(0, 21), (21, 30), *((at, at + 1) for at in range(30, 40))]
    found = torch.cat([run.forward([Feed(ids[a:b].tolist(), a, pages, b - a)]) for a, b in parts])
    wanted = reference_logits(reference(model, run.packed, path), ids, dtype)
    distance = (found - wanted).abs()
    rounds = dtype == "bf16" and dots.ROUNDS_BF16[paths.NAMES.index(path)]
    assert distance.max() < (ROUNDED if rounds else BOUND[dtype])
    if layers == 1:
        assert distance.amax(1).median() < STRICT[dtype]
    if dtype in ("fp32", "bf16"):  # and near to the model itself
        with torch.no_grad():
            assert (found - model(ids[None])[0]).abs().max() < {"fp32": 3e-5, "bf16": 0.3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_and_threads_change_nothing(dtype: str, make_model: MakeModel) -> None:
    """Sequences of many lengths in one call, each wanting other logits, against each alone; 1, 2 and 3
    threads."""
    model = shape(make_model, "qwen")
    generator = torch.Generator().manual_seed(2)
    lengths, wanted = (1, 5, 17, 33, 2, 16), (1, 0, 3, 1, 2, 16)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]
    runs = [runner(model, dtype, threads=threads) for threads in (1, 2, 3)]
    first = iter(range(16))
    feeds = []
    for prompt, want in zip(prompts, wanted, strict=True):
        feeds.append(Feed(prompt, 0, [next(first) for _ in range(-(-len(prompt) // 16))], want))
    together = [run.forward(feeds) for run in runs]
    assert torch.equal(together[0], together[1]) and torch.equal(together[0], together[2])
    alone = torch.cat([runs[0].forward([feed]) for feed in feeds if feed.wanted])
    if dtype.startswith("int") or (dtype == "bf16" and dots.ROUNDS_BF16[paths.NAMES.index(runs[0].path)]):
        assert torch.equal(together[0], alone)
    else:
        assert (together[0] - alone).abs().max() < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_other_programs_fewer_threads_compute_the_same(
    dtype: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads come and go from one call to the next; an asked for number stays."""
    model = shape(make_model, "qwen")
    ids = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    quiet, busy, asked = (runner(model, dtype, threads=threads) for threads in (4, 0, 3))
    others = iter([0.0, 1.0, 4.0, 0.0])
    load = LoadMeter(lambda: None, count=4)
    monkeypatch.setattr(load, "look", lambda: next(others))
    busy._load = load
    used: list[int] = []
    run = busy.team.run
    monkeypatch.setattr(busy.team, "run", lambda job, threads: (used.append(threads), run(job, threads)))
    for start in range(0, 40, 10):
        feed = Feed(ids[start : start + 10], start, [0, 1, 2], 10)
        assert torch.equal(quiet.forward([feed]), busy.forward([feed]))
    assert used == [4, 3, 2, 4]
    assert asked.working() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_nobody_asks_about_are_still_looked_at(dtype: str, make_model: MakeModel) -> None:
    """The last block computes only what is asked for; keys and values are everybody's, in this call and in
    the next ones."""
    model = shape(make_model, "qwen", layers=2)
    ids = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    every = runner(model, dtype).forward([Feed(ids, 0, [0, 1, 2], 40)])
    run = runner(model, dtype)
    other = Feed(ids[5:13], 0, [3], 3)
    assert run.forward([Feed(ids[:20], 0, [0, 1, 2], 0)]).shape == (0, 512)
    found = [
        run.forward([Feed(ids[20:33], 20, [0, 1, 2], 2), other])[:2],
        run.forward([Feed(ids[33:], 33, [0, 1, 2], 1)]),
    ]
    within = ROUNDED if dtype == "bf16" and dots.ROUNDS_BF16[paths.NAMES.index(run.path)] else BOUND[dtype]
    assert (torch.cat(found) - every[[31, 32, 39]]).abs().max() < within
    assert (every[30] - every[32]).abs().max() > 10 * within  # what a wrong row would be


def test_more_rows_than_one_call_takes(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatwright.generate.kernels import runner as module

    model = shape(make_model, "qwen")
    ids = list(range(40))
    whole = runner(model, "fp32").forward([Feed(ids, 0, [0, 1, 2], 40), Feed(ids[:9], 0, [3], 1)])
    monkeypatch.setattr(module, "ROWS", 7)
    pieces = runner(model, "fp32").forward([Feed(ids, 0, [0, 1, 2], 40), Feed(ids[:9], 0, [3], 1)])
    assert (whole - pieces).abs().max() < 1e-5


def test_a_copied_page_is_the_page(make_model: MakeModel) -> None:
    model = shape(make_model, "qwen")
    run = runner(model, "int8")
    ids = list(range(3, 31))
    first = run.forward([Feed(ids, 0, [2, 4], 1)])
    run.copy_page(4, 7)
    run.forward([Feed([9] * 16, 0, [4], 1)])  # the original is overwritten
    assert torch.equal(
        run.forward([Feed(ids[-1:], 27, [2, 7], 1)]), run.forward([Feed(ids[-1:], 27, [2, 7], 1)])
    )
    assert (run.forward([Feed(ids[-1:], 27, [2, 7], 1)]) - first).abs().max() < BOUND["int8"]


def test_shapes_that_the_kernels_lack_are_refused(make_model: MakeModel) -> None:
    for changes, reason in (
        ({"preset": "gpt1", "layers": 1, "width": 32, "heads": 2, "vocab_size": 50}, "post-norm"),
        ({"position": "sinusoidal"}, "sinusoidal"),
    ):
        with pytest.raises(UserError, match=reason):
            KernelRunner(make_model(**changes), "bf16")
    with pytest.raises(UserError, match="int3"):
        KernelRunner(make_model(), "int3")
    with pytest.raises(UserError, match="pages of 16"):
        KernelRunner(make_model(), "bf16").allocate(4, 32)


def test_the_path_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATWRIGHT_KERNELS", "plain")
    assert paths.choose() == "plain"
    assert "without special instructions" in paths.described("plain", 2)
    monkeypatch.setenv("CHATWRIGHT_KERNELS", "mmx")
    with pytest.raises(UserError, match="plain"):
        paths.choose()


@njit
def _quantise(path, kind, x, stride, groups, words, factors, sums):  # type: ignore[no-untyped-def]
    quantise(path, kind, x, stride, 0, 1, groups, words, factors, sums)


def _read_words(path: str, words: np.ndarray) -> np.ndarray:
    """Numbers of 16 bits out of the words that a path makes of them."""
    if not path.startswith("vnni"):
        return words.view(np.int16).reshape(-1, 32)
    upper, lower = words.view(np.int8).reshape(-1, 2, 32).astype(np.int16).transpose(1, 0, 2)
    return upper * 256 + lower


@pytest.mark.parametrize("path", paths.NAMES)
@settings(max_examples=25)
@given(st.integers(1, 100), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4]))
def test_rounding_activations(path: str, width: int, seed: int, size: float) -> None:
    """What the kernels round to, read back, is what the reference says."""
    if reason := missing(path):
        pytest.skip(reason)
    x = torch.randn(width, generator=torch.Generator().manual_seed(seed)) * size
    padded = packing.up_to(width, 32)
    flat = torch.zeros(padded)
    flat[:width] = x
    words, factors, sums = (
        np.zeros(2 * padded, np.uint8),
        np.zeros(padded // 32, np.float32),
        np.zeros(padded // 32, np.float32),
    )

    def round_for(kind: int) -> None:
        _quantise(paths.typed(path), kind, flat.numpy(), padded, padded // 32, words, factors, sums)

    def same(whole: np.ndarray, kind: int) -> bool:
        read = torch.from_numpy(whole.astype(np.float32)) * torch.from_numpy(factors)[:, None]
        return torch.allclose(read.flatten()[:width], rounded_activations(x, kind, path), rtol=1e-6, atol=0)

    round_for(INT8_WEIGHTS)
    whole = _read_words(path, words)
    assert same(whole, INT8_WEIGHTS)
    assert np.array_equal(sums.view(np.int32), -128 * whole.astype(np.int32).sum(1))
    round_for(INT4_WEIGHTS)
    whole = words[:padded].view(np.int8).reshape(-1, 32)
    assert same(whole, INT4_WEIGHTS)
    assert np.array_equal(sums, whole.astype(np.int64).sum(1).astype(np.float32))
    if dots.ROUNDS_BF16[paths.NAMES.index(path)]:
        round_for(BF16_WEIGHTS)
        halves = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(halves[:width].float(), rounded_activations(x, BF16_WEIGHTS, path))


@njit
def _product(path, arena, matrix, x, x_stride, words, factors, sums, rows, out, stride, vectors):  # type: ignore[no-untyped-def]
    if takes_words(path, matrix[FORMAT]):
        quantise(path, matrix[FORMAT], x, x_stride, 0, rows, matrix[GROUPS], words, factors, sums)
    product(
        path, arena, matrix, 0, matrix[TILES], x, x_stride, words, factors, sums, rows, out, stride, vectors
    )


@pytest.mark.parametrize("path", paths.NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_plain_torch(dtype: str, path: str, make_model: MakeModel) -> None:
    """Every matrix of a layer and the output matrix, with biases, added to what is there or not, for few and
    many rows."""
    if reason := missing(path):
        pytest.skip(reason)
    packed = packing.pack(shape(make_model, "gpt2"), dtype)
    draw = torch.Generator().manual_seed(2)
    for number in (*range(layout.MATRICES), len(packed.plan) - 2):
        plan = packed.plan[number]
        weights, kind = packed.matrix(number), int(plan[FORMAT])
        outputs, inputs = weights.shape
        bias = (
            torch.from_numpy(packed.vectors[plan[BIAS] : plan[BIAS] + outputs])
            if plan[BIAS] >= 0
            else torch.zeros(outputs)
        )
        for rows in (1, 3, 4, 9):
            x, out = torch.randn(rows, inputs, generator=draw), torch.randn(rows, outputs, generator=draw)
            given = rounded_activations(x, kind, path)
            there = out.clone() if plan[ADDS] else torch.zeros_like(out)
            words, factors = np.zeros(2 * x.numel(), np.uint8), np.zeros((2, x.numel() // 32), np.float32)
            _product(
                paths.typed(path),
                packed.arena,
                plan,
                x.flatten().numpy(),
                inputs,
                words,
                *factors,
                rows,
                out.view(-1).numpy(),
                outputs,
                packed.vectors,
            )
            wanted = there.double() + given.double() @ weights.double().T + bias
            size = there.abs() + given.abs() @ weights.abs().T + bias.abs()
            assert ((out - wanted).abs() <= 1e-6 * size).all()


def test_one_compilation_serves_every_model(make_model: MakeModel) -> None:
    """What is compiled ahead is what then runs: other argument types would be compiled anew, ten seconds
    each."""
    path = paths.typed(paths.choose())
    for dtype in DTYPES:
        runner(make_model(), dtype).forward([Feed([1, 2], 0, [0], 1)])
    kinds = [signature for signature in step.forward.signatures if signature[0] == typeof(path)]
    assert len(kinds) == 1


def test_compiled_code_counts_no_references() -> None:
    """Two threads that count the same arrays in their loops wait for each other: a third of the time of a
    long prompt, once."""
    attend = njit(**compiling._OPTIONS)(attention.attend.py_func)
    whole, real = np.zeros(layout.DIMS, np.int64), np.zeros(64, np.float32)
    attend(
        0,
        1,
        whole,
        real,
        0,
        0,
        0,
        real,
        whole,
        np.zeros((1, 1), np.int64),
        whole.view(np.uint8),
        whole.view(np.uint8),
        real,
        real,
    )
    (code,) = attend.inspect_llvm().values()
    assert "NRT_incref" not in code


def test_a_team_tells_what_its_helpers_raise() -> None:
    from chatwright.generate.kernels.runner import Team

    team = Team(3)

    def job(number: int) -> None:
        if number == 2:
            raise ValueError("from a helper")

    with pytest.raises(ValueError, match="from a helper"):
        team.run(job)
    seen: list[int] = []
    team.run(seen.append)
    assert sorted(seen) == [0, 1, 2]

    def interrupted(number: int) -> None:
        if number == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        team.run(interrupted)
    seen.clear()
    team.run(seen.append)
    assert sorted(seen) == [0, 1, 2]
    seen.clear()
    team.run(seen.append, 2)
    team.run(seen.append, 1)
    assert sorted(seen) == [0, 0, 1]
    team.close()


def test_a_runner_leaves_nothing_behind(make_model: MakeModel) -> None:
    """Neither threads nor weights."""
    import gc
    import threading
    import weakref

    before = set(threading.enumerate())  # helpers of earlier tests may still be about to end
    run = runner(make_model(), "bf16", threads=3)
    run.forward([Feed([1], 0, [0])])
    helpers = [thread for thread in threading.enumerate() if thread not in before]
    assert len(helpers) == 2
    weights = weakref.ref(run.packed)
    del run
    gc.collect()
    assert weights() is None
    for thread in helpers:
        thread.join(10)
        assert not thread.is_alive()


def test_no_memory_for_the_cache_is_said(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="no memory for a key-value cache"):
        KernelRunner(make_model(), "bf16").allocate(1 << 44, 16)


@pytest.mark.parametrize("place", ["open", "file", "fine"])
def test_compiled_code_is_kept_only_where_nobody_else_writes(place: str, tmp_path: Path) -> None:
    from chatwright.generate.kernels import _is_ours

    folder = tmp_path / "cache" / "kernels"
    if place == "open":
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    elif place == "file":
        folder.parent.write_text("")
    assert _is_ours(folder) == (place == "fine")
