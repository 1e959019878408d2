"""Each instruction of `tools.ptxsim` on hand-written PTX, against Python's integers, torch and the PTX ISA."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.ptxsim import Program, Unsupported, launch

THREADS = 32
MASK = 2**32 - 1
TEMPLATE = """.version 8.7
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
 .param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d
)
.reqntid 32
{
 .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<9>; .reg .b16 %rs<9>;
 ld.param.b64 %rd1, [a]; ld.param.b64 %rd2, [b]; ld.param.b64 %rd3, [c]; ld.param.b64 %rd4, [d];
 mov.u32 %r1, %tid.x; mul.wide.u32 %rd5, %r1, 4;
 add.s64 %rd1, %rd1, %rd5; add.s64 %rd2, %rd2, %rd5; add.s64 %rd3, %rd3, %rd5; add.s64 %rd4, %rd4, %rd5;
 ld.global.b32 %r2, [%rd1]; ld.global.b32 %r3, [%rd2]; ld.global.b32 %r4, [%rd3];
BODY
 st.global.b32 [%rd4], %r5;
 ret;
}
"""


def run(body: str, *inputs: Tensor, shared: int = 0) -> list[int]:
    """What %r5 holds in each thread after `body`, as unsigned; %r2 to %r4 hold the inputs [32] int32."""
    given = [*inputs, *[torch.zeros(THREADS, dtype=torch.int32)] * (3 - len(inputs))]
    out = torch.zeros(THREADS, dtype=torch.int32)
    report = launch(Program(TEMPLATE.replace("BODY", body)), (1, 1, 1), [*given, out], warps=1, shared=shared)
    assert not report.races
    return [value & MASK for value in out.tolist()]


def numbers(seed: int) -> list[int]:
    """32-bit numbers, those at the edges among them."""
    chance = random.Random(seed)
    edges = [0, 1, 2, 5, 31, 32, 33, 0x7FFFFFFF, 0x80000000, MASK]
    return [chance.choice([*edges, chance.getrandbits(32), chance.getrandbits(8)]) for _ in range(THREADS)]


def tensor(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.uint32).view(np.int32))


def signed(value: int) -> int:
    return value - 2**32 if value >> 31 else value


def permuted(a: int, b: int, selector: int) -> int:
    """prmt."""
    found = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (nibble & 7) & 255
        found |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return found


@pytest.mark.parametrize(
    "body, expected",
    [
        ("add.s32 %r5,%r2,%r3;", lambda a, b, c: a + b),
        ("sub.s32 %r5,%r2,%r3;", lambda a, b, c: a - b),
        ("mul.lo.s32 %r5,%r2,%r3;", lambda a, b, c: a * b),
        ("mad.lo.s32 %r5,%r2,%r3,%r4;", lambda a, b, c: a * b + c),
        ("min.s32 %r5,%r2,%r3;", lambda a, b, c: min(signed(a), signed(b))),
        ("max.u32 %r5,%r2,%r3;", lambda a, b, c: max(a, b)),
        ("neg.s32 %r5,%r2;", lambda a, b, c: -a),
        ("not.b32 %r5,%r2;", lambda a, b, c: ~a),
        ("xor.b32 %r5,%r2,-2;", lambda a, b, c: a ^ -2),
        ("shl.b32 %r5,%r2,%r3;", lambda a, b, c: a << b if b < 32 else 0),
        ("shr.u32 %r5,%r2,%r3;", lambda a, b, c: a >> b if b < 32 else 0),
        ("shr.s32 %r5,%r2,%r3;", lambda a, b, c: signed(a) >> min(b, 31)),
        ("bfe.u32 %r5,%r2,%r3,7;", lambda a, b, c: a >> (b & 255) & 127),
        ("bfe.s32 %r5,%r2,3,5;", lambda a, b, c: ((a >> 3 & 31) ^ 16) - 16),
        ("prmt.b32 %r5,%r2,%r3,%r4;", permuted),
        ("mul.wide.s32 %rd6,%r2,%r3; shr.u64 %rd6,%rd6,32; cvt.u32.u64 %r5,%rd6;",
         lambda a, b, c: signed(a) * signed(b) >> 32),
        ("mad.wide.s32 %rd6,%r2,%r3,4294967296; shr.u64 %rd6,%rd6,32; cvt.u32.u64 %r5,%rd6;",
         lambda a, b, c: (signed(a) * signed(b) >> 32) + 1),
        ("cvt.s64.s32 %rd6,%r2; shr.s64 %rd6,%rd6,40; cvt.u32.u64 %r5,%rd6;", lambda a, b, c: signed(a) >> 40),
        ("mov.b32 {%rs1,%rs2},%r2; mov.b32 %r5,{%rs2,%rs1};", lambda a, b, c: a >> 16 | (a & 0xFFFF) << 16),
        ("cvt.u16.u32 %rs1,%r2; cvt.s32.s16 %r5,%rs1;", lambda a, b, c: (a & 0xFFFF) - (a & 0x8000) * 2),
        ("setp.lt.s32 %p1,%r2,%r3; selp.b32 %r5,%r2,%r3,%p1;", lambda a, b, c: min(signed(a), signed(b))),
        ("setp.lt.u32 %p1|%p2,%r2,%r3; selp.b32 %r5,%r2,%r3,%p2;", max),
        ("setp.ne.b32 %p1,%r4,0; setp.lt.and.u32 %p2|%p3,%r2,%r3,%p1; selp.b32 %r5,2,0,%p2; @%p3 or.b32 %r5,%r5,1;",
         lambda a, b, c: 0 if c == 0 else 2 if a < b else 1),
        ("setp.lt.u32 %p1,%r2,%r3; mov.b32 %r5,7; @!%p1 mov.b32 %r5,%r2;", lambda a, b, c: 7 if a < b else a),
        ("setp.lt.u32 %p1,%r2,%r3; setp.gt.s32 %p2,%r2,%r4; and.pred %p3,%p1,%p2; not.pred %p4,%p3; mov.pred %p5,%p4;"
         " selp.f32 %r5,%r2,%r3,%p5;", lambda a, b, c: b if a < b and signed(a) > signed(c) else a),
        ("max.s32 %r5,%r2,%r3;", lambda a, b, c: max(signed(a), signed(b))),
        ("min.u32 %r5,%r2,%r3;", lambda a, b, c: min(a, b)),
        ("bar.warp.sync -1; or.b32 %r5,%r2,%r3;", lambda a, b, c: a | b),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_integers(body: str, expected: Callable[..., int], seed: int) -> None:
    a, b, c = (numbers(3 * seed + i) for i in range(3))
    if expected is max:  # of two
        assert run(body, tensor(a), tensor(b), tensor(c)) == [max(x, y) for x, y in zip(a, b, strict=True)]
        return
    wanted = [expected(x, y, z) & MASK for x, y, z in zip(a, b, c, strict=True)]
    assert run(body, tensor(a), tensor(b), tensor(c)) == wanted


def wide(a: int, b: int) -> int:
    """The signed number of 64 bits with the words b and a."""
    return signed(a) << 32 | b


#: %rd6 and %rd7 from the words (%r2, %r3) and (%r4, %r2), the first of each pair the upper; %rd8 in two words to %r5.
WIDE = "mov.b64 %rd6,{%r3,%r2}; mov.b64 %rd7,{%r2,%r4};"
FOLD = "cvt.u32.u64 %r5,%rd8; shr.u64 %rd8,%rd8,32; cvt.u32.u64 %r6,%rd8; mad.lo.s32 %r5,%r6,31,%r5;"


@pytest.mark.parametrize(
    "body, expected",
    [
        ("add.s64 %rd8,%rd6,%rd7;", lambda x, y: x + y),
        ("mul.lo.s64 %rd8,%rd6,%rd7;", lambda x, y: x * y),
        ("mad.lo.s64 %rd8,%rd6,%rd7,%rd6;", lambda x, y: x * y + x),
        ("min.s64 %rd8,%rd6,%rd7;", min),
        ("and.b64 %rd8,%rd6,%rd7;", lambda x, y: x & y),
        ("or.b64 %rd8,%rd6,%rd7;", lambda x, y: x | y),
        ("xor.b64 %rd8,%rd6,%rd7;", lambda x, y: x ^ y),
        ("not.b64 %rd8,%rd6;", lambda x, y: ~x),
        ("shl.b64 %rd8,%rd6,7;", lambda x, y: x << 7),
        ("mov.u64 %rd8,%rd7;", lambda x, y: y),
        ("cvt.u64.u32 %rd8,%r3;", lambda x, y: x & MASK),
        ("setp.lt.s64 %p1,%rd6,%rd7; selp.b64 %rd8,%rd6,%rd7,%p1;", min),
        ("setp.gt.s64 %p1,%rd6,0; selp.b64 %rd8,%rd6,%rd7,%p1;", lambda x, y: x if x > 0 else y),
        ("setp.eq.b64 %p1,%rd6,%rd7; selp.b64 %rd8,1,2,%p1;", lambda x, y: 1 if x == y else 2),
        ("setp.ne.b64 %p1,%rd6,%rd7; selp.b64 %rd8,1,2,%p1;", lambda x, y: 1 if x != y else 2),
    ],
)
def test_integers_of_64_bits(body: str, expected: Callable[[int, int], int]) -> None:
    a, b, c = numbers(1), numbers(2), numbers(3)
    a[:4], b[:4], c[:4] = [7] * 4, [7] * 4, [7] * 4
    results = (expected(wide(x, y), wide(z, x)) % 2**64 for x, y, z in zip(a, b, c, strict=True))
    wanted = [((result >> 32) * 31 + result) & MASK for result in results]
    assert run(f"{WIDE} {body} {FOLD}", tensor(a), tensor(b), tensor(c)) == wanted


def short(value: int) -> int:
    """The signed number of its low 16 bits."""
    return (value & 0xFFFF ^ 0x8000) - 0x8000


@pytest.mark.parametrize(
    "body, expected",
    [
        ("and.b16 %rs3,%rs1,%rs2;", lambda a, b: a & b),
        ("or.b16 %rs3,%rs1,%rs2;", lambda a, b: a | b),
        ("shl.b16 %rs3,%rs1,3;", lambda a, b: a << 3),
        ("mov.b16 %rs3,%rs2;", lambda a, b: b),
        ("mov.u16 %rs3,%rs1;", lambda a, b: a),
        ("setp.lt.s16 %p1,%rs1,%rs2; selp.b16 %rs3,%rs1,%rs2,%p1;", lambda a, b: min(short(a), short(b))),
        ("setp.ne.b16 %p1,%rs1,%rs2; selp.b16 %rs3,1,2,%p1;", lambda a, b: 1 if a & 0xFFFF != b & 0xFFFF else 2),
    ],
)
def test_integers_of_16_bits(body: str, expected: Callable[[int, int], int]) -> None:
    a, b = numbers(1), numbers(2)
    b[::5] = a[::5]
    wanted = [expected(x, y) & 0xFFFF for x, y in zip(a, b, strict=True)]
    assert (
        run(f"cvt.u16.u32 %rs1,%r2; cvt.u16.u32 %rs2,%r3; {body} cvt.u32.u16 %r5,%rs3;", tensor(a), tensor(b)) == wanted
    )


@pytest.mark.parametrize(
    "body, element",
    [
        # where element e of the words is read from: x itself, its address in %rd1
        ("ld.global.v2.b32 {%r6,%r5}, [%rd6];", lambda x, i: x[2 * i + 1]),
        ("ld.global.v4.b32 {%r6,%r7,%r5,%r8}, [%rd7];", lambda x, i: x[4 * i + 2]),
        ("ld.global.b64 %rd8, [%rd6]; shr.u64 %rd8,%rd8,32; cvt.u32.u64 %r5,%rd8;", lambda x, i: x[2 * i + 1]),
        ("ld.global.b16 %rs1, [%rd6+2]; cvt.u32.u16 %r5,%rs1;", lambda x, i: x[2 * i] >> 16),
        ("ld.global.b8 %rs1, [%rd6+3]; cvt.u32.u16 %r5,%rs1;", lambda x, i: x[2 * i] >> 24),
    ],
)
def test_global_loads(body: str, element: Callable[[list[int], int], int]) -> None:
    x = [*numbers(1), *numbers(2), *numbers(3), *numbers(4)]
    setup = "ld.param.b64 %rd9, [a]; mul.wide.u32 %rd6,%r1,8; mul.wide.u32 %rd7,%r1,16;"
    body = f"{setup} add.s64 %rd6,%rd9,%rd6; add.s64 %rd7,%rd9,%rd7; {body}"
    assert run(body, tensor(x)) == [element(x, i) for i in range(THREADS)]


@pytest.mark.parametrize(
    "store, load, wanted",
    [
        # 16 bytes a thread; %rs1 to %rs4 are the halves of a and b
        ("v2.b32 [%r8], {%r2,%r3}", "b32 %r5, [%r8+4]", lambda a, b: b),
        ("v4.b32 [%r8], {%r4,%r2,%r3,%r4}", "v2.b32 {%r5,%r6}, [%r8+8]", lambda a, b: b),
        ("v4.b32 [%r8], {%r4,%r2,%r3,%r4}", "v4.b32 {%r6,%r5,%r7,%r9}, [%r8]", lambda a, b: a),
        ("b16 [%r8+2], %rs2", "b16 %rs5, [%r8+2]; cvt.u32.u16 %r5,%rs5", lambda a, b: a >> 16),
        ("v2.b16 [%r8], {%rs3,%rs2}", "b32 %r5, [%r8]", lambda a, b: b & 0xFFFF | a & 0xFFFF0000),
        ("v4.b16 [%r8], {%rs1,%rs2,%rs3,%rs4}", "b32 %r5, [%r8+4]", lambda a, b: b),
        ("b32 [%r8], %r2", "v2.b16 {%rs5,%rs6}, [%r8]; mov.b32 %r5,{%rs6,%rs5}", lambda a, b: a >> 16 | a << 16),
        ("v2.b32 [%r8], {%r2,%r3}", "v4.b16 {%rs5,%rs6,%rs7,%rs8}, [%r8]; mov.b32 %r5,{%rs7,%rs8}", lambda a, b: b),
        ("v2.b8 [%r8], {%rs1,%rs3}", "b8 %rs5, [%r8+1]; cvt.u32.u16 %r5,%rs5", lambda a, b: b & 0xFF),
    ],
)
def test_shared_memory(store: str, load: str, wanted: Callable[[int, int], int]) -> None:
    body = f"""
 mov.b32 %r8, global_smem; shl.b32 %r7, %r1, 4; add.s32 %r8, %r8, %r7;
 mov.b32 {{%rs1,%rs2}},%r2; mov.b32 {{%rs3,%rs4}},%r3; st.shared.{store}; ld.shared.{load};"""
    a, b = numbers(1), numbers(2)
    found = run(body, tensor(a), tensor(b), shared=16 * THREADS)
    assert found == [wanted(x, y) & MASK for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("elements", [2, 4])
def test_global_stores(elements: int) -> None:
    """Thread i stores the words i, 100 + i, ... side by side."""
    values = [f"%r{6 + e}" for e in range(elements)]
    body = "".join(f" add.s32 {value}, %r1, {100 * e};" for e, value in enumerate(values))
    body += f" ld.param.b64 %rd9, [a]; mul.wide.u32 %rd6, %r1, {4 * elements}; add.s64 %rd6, %rd9, %rd6;"
    body += f" st.global.v{elements}.b32 [%rd6], {{{', '.join(values)}}}; mov.b32 %r5, 0;"
    x = torch.zeros(elements * THREADS, dtype=torch.int32)
    run(body, x)
    assert x.tolist() == [i + 100 * e for i in range(THREADS) for e in range(elements)]


def test_copies_of_16_bytes() -> None:
    """cp.async.cg; where fewer bytes are read, the rest is zeros."""
    x = [*numbers(1), *numbers(2), *numbers(3), *numbers(4)]
    body = """
 mov.b32 %r8, global_smem; shl.b32 %r7, %r1, 4; add.s32 %r8, %r8, %r7; ld.param.b64 %rd9, [a];
 mul.wide.u32 %rd6, %r1, 16; add.s64 %rd6, %rd9, %rd6; setp.lt.u32 %p1, %r1, 20; selp.b32 %r9, 16, 0, %p1;
 cp.async.cg.shared.global [%r8], [%rd6], 0x10, %r9; cp.async.commit_group; cp.async.wait_group 0;
 ld.shared.b32 %r5, [%r8+8];"""
    assert run(body, tensor(x), shared=16 * THREADS) == [x[4 * i + 2] if i < 20 else 0 for i in range(THREADS)]


@pytest.mark.parametrize(
    "body, source",
    [
        ("shfl.sync.bfly.b32 %r5,%r2,16,31,-1;", lambda i, b: i ^ 16),
        ("shfl.sync.idx.b32 %r5,%r2,7,31,-1;", lambda i, b: 7),
        ("shfl.sync.idx.b32 %r5,%r2,%r3,31,-1;", lambda i, b: b % 32),
    ],
)
def test_shuffles(body: str, source: Callable[[int, int], int]) -> None:
    a, b = numbers(1), numbers(2)
    assert run(body, tensor(a), tensor(b)) == [a[source(i, b[i])] for i in range(THREADS)]


# -- floating point ----------------------------------------------------------------------------------------------------

X = torch.tensor(
    [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 1e-40, 3.4e38, 65504.0, 65520.0, 1e-8, 0.5, 1.5, 2.5, -2.5]
    + [random.Random(i).gauss(0, 100) for i in range(16)]
)
Y = X.roll(5)


def as_floats(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.uint32).view(np.float32))


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To 10 mantissa bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).where(x.isfinite(), x)


@pytest.mark.parametrize(
    "body, expected",
    [
        ("add.f32 %r5,%r2,%r3;", X + Y),
        ("sub.rn.f32 %r5,%r2,%r3;", X - Y),
        ("mul.rn.f32 %r5,%r2,%r3;", X * Y),
        ("div.full.f32 %r5,%r2,%r3;", X / Y),
        ("fma.rn.f32 %r5,%r2,%r3,%r4;", (X.double() * Y.double() + Y.double()).float()),
        ("max.f32 %r5,%r2,%r3;", torch.fmax(X, Y)),
        ("max.NaN.f32 %r5,%r2,%r3;", torch.maximum(X, Y)),
        ("min.f32 %r5,%r2,%r3;", torch.fmin(X, Y)),
        ("abs.f32 %r5,%r2;", X.abs()),
        ("neg.f32 %r5,%r2;", -X),
        ("ex2.approx.f32 %r5,%r2;", X.double().exp2().float()),
        ("sqrt.approx.ftz.f32 %r5,%r2;", torch.where(X.abs() < 1e-38, 0.0 * X, X).double().sqrt().float()),
        ("cvt.rmi.f32.f32 %r5,%r2;", X.floor()),
        ("cvt.rn.bf16x2.f32 %r5,%r2,%r3; and.b32 %r5,%r5,0xffff0000;", X.bfloat16().float()),
        ("cvt.rn.bf16x2.f32 %r5,%r2,%r3; shl.b32 %r5,%r5,16;", Y.bfloat16().float()),
        ("cvt.rn.f16.f32 %rs1,%r2; cvt.f32.f16 %r5,%rs1;", X.half().float()),
        ("cvt.rn.f16x2.f32 %r5,%r2,%r3; mov.b32 {%rs1,%rs2},%r5; cvt.f32.f16 %r5,%rs2;", X.half().float()),
        ("cvt.rn.f16x2.f32 %r5,%r2,%r3; mov.b32 {%rs1,%rs2},%r5; cvt.f32.f16 %r5,%rs1;", Y.half().float()),
        ("cvt.rn.f32.s32 %r5,%r2;", X.view(torch.int32).float()),
        ("cvt.rn.bf16.f32 %rs1,%r2; abs.bf16 %rs1,%rs1; cvt.f32.bf16 %r5,%rs1;", X.bfloat16().float().abs()),
        ("cvt.rn.bf16.f32 %rs1,%r2; cvt.f32.bf16 %r5,%rs1;", X.bfloat16().float()),
        ("add.f32 %r5,%r2,0f3F800000;", X + 1),
        ("cvt.rna.tf32.f32 %r5,%r2;", rounded_to_tf32(X)),
    ],
)
def test_floats(body: str, expected: Tensor) -> None:
    given = [X.view(torch.int32), Y.view(torch.int32), Y.view(torch.int32)]
    found = as_floats(run(body, *given))
    if "ex2" in body:  # numpy's own is within an ulp
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=2e-45, equal_nan=True)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind, dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
@pytest.mark.parametrize(
    "body, formula",
    [
        ("mul.KIND %r5,%r2,%r3;", lambda x, y: x * y),
        ("add.KIND %r5,%r2,%r3;", lambda x, y: x + y),
        ("max.NaN.KIND %r5,%r2,%r3;", torch.maximum),
        ("abs.KIND %r5,%r2;", lambda x, y: x.abs()),
    ],
)
def test_packed_halves(kind: str, dtype: torch.dtype, body: str, formula: Callable[..., Tensor]) -> None:
    x, y = torch.stack([X, Y], 1).to(dtype), torch.stack([Y, X.roll(3)], 1).to(dtype)
    found = tensor(run(body.replace("KIND", kind), x.view(torch.int32)[:, 0], y.view(torch.int32)[:, 0]))
    expected = formula(x.float(), y.float()).to(dtype)
    torch.testing.assert_close(found[:, None].view(dtype), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind, dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
@pytest.mark.parametrize(
    "comparison, formula",
    [
        ("ne", lambda x, y: x < y or x > y),
        ("neu", lambda x, y: x != y),
        ("lt", lambda x, y: x < y),
        ("geu", lambda x, y: not x < y),
    ],
)
def test_a_packed_comparison_gives_a_predicate_for_each_half(
    kind: str, dtype: torch.dtype, comparison: str, formula: Callable[[float, float], bool]
) -> None:
    """PTX ISA, half precision comparison: p is the result of the low halves, q that of the high ones."""
    thread = torch.arange(THREADS)
    x = torch.stack([X, X.roll(1)], 1).to(dtype)
    same = torch.stack([thread % 2 == 0, thread // 2 % 2 == 0], 1)
    y = torch.where(same, x, torch.stack([Y, Y.roll(2)], 1).to(dtype))
    body = f"setp.{comparison}.{kind} %p1|%p2,%r2,%r3; selp.b32 %r5,1,0,%p1; @%p2 or.b32 %r5,%r5,2;"
    wanted = [
        int(formula(a[0], b[0])) + 2 * int(formula(a[1], b[1])) for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]
    assert run(body, x.view(torch.int32)[:, 0], y.view(torch.int32)[:, 0]) == wanted
    assert set(wanted) >= {1, 2}


@pytest.mark.parametrize(
    "comparison, formula",
    [
        ("eq", lambda a, b: a == b),
        ("lt", lambda a, b: a < b),
        ("ltu", lambda a, b: not a >= b),
        ("ne", lambda a, b: a < b or a > b),
        ("neu", lambda a, b: a != b),
        ("equ", lambda a, b: not (a < b or a > b)),
        ("nan", lambda a, b: math.isnan(a) or math.isnan(b)),
        ("num", lambda a, b: not (math.isnan(a) or math.isnan(b))),
    ],
)
def test_comparisons(comparison: str, formula: Callable[[float, float], bool]) -> None:
    y = torch.where(torch.arange(THREADS) % 3 == 0, X, Y)
    body = f"setp.{comparison}.f32 %p1,%r2,%r3; selp.b32 %r5,1,0,%p1;"
    wanted = [int(formula(a, b)) for a, b in zip(X.tolist(), y.tolist(), strict=True)]
    assert run(body, X.view(torch.int32), y.view(torch.int32)) == wanted


def test_conversion_to_integers_saturates() -> None:
    def saturated(x: float) -> int:
        return 0 if math.isnan(x) else max(-(2**31), min(2**31 - 1, x if math.isinf(x) else math.trunc(x)))  # type: ignore[return-value]

    found = run("cvt.rzi.s32.f32 %r5,%r2;", X.view(torch.int32))
    assert [signed(value) for value in found] == [saturated(x) for x in X.tolist()]


# -- matrices ----------------------------------------------------------------------------------------------------------


def halves(values: Tensor) -> list[int]:
    """The words of 16-bit values [n, 2]."""
    return [value & MASK for value in values.contiguous().view(torch.int32)[:, 0].tolist()]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_spreads_rows_over_the_warp(count: int, transposed: bool) -> None:
    """PTX ISA: thread i has elements 2 (i % 4) and the next of row i / 4; threads from 8 m on name matrix m's rows."""
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    words = tensor(halves(matrices.view(-1, 2)))
    for m in range(count):
        registers = ["%r6", "%r7", "%r8", "%r9"][:count]
        body = f"""
 mov.b32 %r10, global_smem; shl.b32 %r11, %r1, 2; add.s32 %r11, %r10, %r11;
 {" ".join(f"ld.global.b32 %r12, [%rd1+{128 * i}]; st.shared.b32 [%r11+{128 * i}], %r12;" for i in range(count))}
 bar.sync 0; shl.b32 %r12, %r1, 4; add.s32 %r12, %r10, %r12;
 ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {{{", ".join(registers)}}}, [%r12];
 mov.b32 %r5, {registers[m]};"""
        wanted = matrices[m].T if transposed else matrices[m]
        assert run(body, words, shared=512) == halves(wanted.contiguous().view(32, 2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(count: int, transposed: bool) -> None:
    words, mode = tensor(numbers(4)), ".trans" * transposed
    for m in range(count):
        given = ", ".join("%r2" if i == m else "%r1" for i in range(count))
        body = f"""
 mov.b32 %r6, global_smem; shl.b32 %r9, %r1, 4; add.s32 %r9, %r6, %r9;
 stmatrix.sync.aligned.m8n8.x{count}{mode}.shared.b16 [%r9], {{{given}}}; bar.sync 0; add.s32 %r9, %r9, {128 * m};
 ldmatrix.sync.aligned.m8n8.x1{mode}.shared.b16 {{%r5}}, [%r9];"""
        assert tensor(run(body, words, shared=1024)).tolist() == words.tolist()


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma(kind: str, dtype: torch.dtype) -> None:
    """m16n8k16, one register of the result after the other; places as the PTX ISA draws them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    lane = torch.arange(32)
    group, within = lane // 4, lane % 4
    pair = torch.arange(2)

    def left(register: int) -> Tensor:
        rows, columns = group + 8 * (register % 2), 2 * within + 8 * (register // 2)
        return tensor(halves(a[rows[:, None], columns[:, None] + pair]))

    def right(register: int) -> Tensor:
        return tensor(halves(b[2 * within[:, None] + 8 * register + pair, group[:, None]]))

    registers = [*map(left, range(4)), *map(right, range(2))]
    loads = "".join(f" ld.global.b32 %r{10 + i}, [%rd1 + {128 * i}];\n" for i in range(6))
    product = a.double() @ b.double()
    for register in range(4):
        moved = f" mov.b32 %r5, %r{6 + register};"
        body = f"""{loads} mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r8, 0; mov.b32 %r9, 0;
 mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r6, %r7, %r8, %r9}},
  {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r6, %r7, %r8, %r9}};
{moved}"""
        found = as_floats(run(body, torch.cat(registers)))
        expected = product[group + 8 * (register // 2), 2 * within + register % 2]
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0)


def test_mma_of_tf32() -> None:
    """m16n8k8; the last 13 bits of the operands do not count."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)
    lane = torch.arange(32)
    group, within = lane // 4, lane % 4
    left = [a[group + 8 * (i % 2), within + 4 * (i // 2)] for i in range(4)]
    right = [b[within + 4 * i, group] for i in range(2)]
    loads = "".join(f" ld.global.b32 %r{10 + i}, [%rd1 + {128 * i}];\n" for i in range(6))
    body = f"""{loads} mov.b32 %r6, 0f3F800000; mov.b32 %r7, 0; mov.b32 %r8, 0; mov.b32 %r9, 0;
 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r6, %r7, %r8, %r9}},
  {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r6, %r7, %r8, %r9}};
 mov.b32 %r5, %r6;"""
    found = as_floats(run(body, torch.cat([*left, *right]).view(torch.int32)))
    a, b = ((x.view(torch.int32) & -0x2000).view(torch.float32).double() for x in (a, b))
    torch.testing.assert_close(found, (1 + a @ b)[group, 2 * within].float(), rtol=0, atol=0)


# -- control flow ------------------------------------------------------------------------------------------------------


def test_threads_diverge_and_meet_again() -> None:
    body = """ mov.b32 %r5,0; and.b32 %r6,%r1,7;
$L1:
 add.s32 %r5,%r5,%r6; sub.s32 %r6,%r6,1; setp.gt.s32 %p1,%r6,0; @%p1 bra $L1;
 setp.gt.u32 %p2,%r1,20; @%p2 bra $L2; add.s32 %r5,%r5,1000;
$L2:
 shfl.sync.bfly.b32 %r5,%r5,0,31,-1;"""
    counts = [i % 8 * (i % 8 + 1) // 2 for i in range(THREADS)]
    assert run(body) == [count + 1000 * (i <= 20) for i, count in enumerate(counts)]


def test_threads_that_return_early_store_nothing() -> None:
    out = run(" mov.b32 %r5, 9; setp.lt.u32 %p1, %r1, 10; @%p1 ret;")
    assert out == [0] * 10 + [9] * 22


def test_a_guarded_load_of_nowhere_is_not_made() -> None:
    assert (
        run(" mov.b32 %r5, 3; mov.b64 %rd7, 0; setp.gt.u32 %p1, %r1, 99; @%p1 ld.global.b32 %r5, [%rd7];") == [3] * 32
    )


def test_hints_change_nothing() -> None:
    assert run(' .pragma "used_bytes_mask 0xfff";\n .pragma "nounroll";\n mov.b32 %r5, 4;') == [4] * 32


@pytest.mark.parametrize(
    "statement",
    [
        '.pragma "enable_smem_spilling";',
        "atom.global.add.u32 %r5, [%rd1], 1;",
        "wgmma.fence.sync.aligned;",
        "cp.async.bulk.commit_group;",
        "ld.local.b32 %r5, [%r1];",
        "ld.global.s16 %r5, [%rd1];",
        "@%p1 setp.lt.s32 %p1|%p2, %r2, %r3;",
        "add.rz.f32 %r5, %r2, %r3;",
        "shfl.sync.up.b32 %r5,%r2,3,0,-1;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r5}, {%r2}, {%r3}, {%r4};",
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(statement: str) -> None:
    with pytest.raises(Unsupported) as raised:
        Program(TEMPLATE.replace("BODY", f" .loc 1 7 3 // kernel.py:7:3\n {statement}"))
    assert statement.rstrip(";") in str(raised.value)
    assert "kernel.py:7:3" in str(raised.value)
