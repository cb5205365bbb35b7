"""Decodes the quantized formats in registers, to exact values of the compute dtype.

Only codes are decoded here; scales multiply the float32 sums, once for each group, so no weight is ever rounded. Where
decoding leaves a factor, a power of two, it goes into the scale. ``reference_dequant`` is the specification.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_of(packed, BN: tl.constexpr, BK: tl.constexpr):
    """The 4-bit codes [BN, BK] of bytes [BN, BK / 2], the low half first."""
    return tl.reshape(tl.join(packed & 15, packed >> 4), (BN, BK))


@triton.jit
def decode_int4(codes, zeros, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """``codes - zeros[:, None]``. Codes are or-ed into the mantissa of a power of two, which is then subtracted."""
    if dtype == tl.float16:  # 0x6400 is 1024, whose last bit is worth 1
        shifted = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return shifted - (zeros.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)[:, None]
    elif dtype == tl.bfloat16 and not INTERPRET:  # 0x4300 is 128, whose last bit is worth 1
        shifted = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        # Zero-points reach 16, and these can be or-ed too: 128 has seven bits of mantissa.
        return shifted - (zeros.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)[:, None]
    else:
        return codes.to(tl.float32) - zeros.to(tl.float32)[:, None]


@triton.jit
def decode_fp8(codes, dtype: tl.constexpr, HARDWARE: tl.constexpr, INTERPRET: tl.constexpr):
    """e4m3 codes (uint8), by the conversion instruction of sm_89 and later or by moving bits."""
    if HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        is_nan = (codes & 0x7F) == 0x7F
        if dtype == tl.float16:  # the exponents' biases differ by 8; subnormals stay subnormal; products are exact
            bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
            value = tl.where(is_nan, 0x7E00, bits).to(tl.uint16).to(tl.float16, bitcast=True)
            return value * 256.0
        else:
            bits = ((codes & 0x80).to(tl.uint32) << 24) | ((codes & 0x7F).to(tl.uint32) << 20)
            value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120, the biases' difference
            value = tl.where(is_nan, float("nan"), value)
            return value if INTERPRET else value.to(dtype)


@triton.jit
def decode_e2m1(codes, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """e2m1 codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    if dtype == tl.float16:  # the biases differ by 14
        bits = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 9)
        return bits.to(tl.float16, bitcast=True) * 16384.0
    elif dtype == tl.bfloat16 and not INTERPRET:  # by 126
        bits = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 6)
        return bits.to(tl.bfloat16, bitcast=True) * tl.full((1, 1), 8.507059173023462e37, tl.bfloat16)
    else:
        bits = ((codes & 8).to(tl.uint32) << 28) | ((codes & 7).to(tl.uint32) << 22)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e8m0(codes):
    """``2^(code - 127)`` in float32; 255 is NaN."""
    bits = tl.where(codes == 0, 0x400000, codes.to(tl.int32) << 23)  # 2^-127 is subnormal
    return tl.where(codes == 255, float("nan"), bits.to(tl.int32).to(tl.float32, bitcast=True))


# Decodes four weights of BF12 ($2 their signs and mantissas, $3 their bytes of codes) to bfloat16, two in a register,
# each over BF12_UNIT. An instruction here serves two or four weights; in 16-bit arithmetic it would serve one.
_FOUR_OF_BF12 = """{
    .reg .b32 bytes, pair, codes;
    prmt.b32 bytes, $2, 0, 0xba98;
    and.b32 bytes, bytes, 0x7f7f7f7f;
    xor.b32 bytes, bytes, $2;
    prmt.b32 pair, bytes, 0, 0x1100;
    and.b32 pair, pair, 0x807f807f;
    prmt.b32 codes, $3, 0, 0x4140;
    shl.b32 codes, codes, SHIFT;
    and.b32 codes, codes, 0x07800780;
    or.b32 codes, codes, 0x40004000;
    or.b32 $0, pair, codes;
    prmt.b32 pair, bytes, 0, 0x3322;
    and.b32 pair, pair, 0x807f807f;
    prmt.b32 codes, $3, 0, 0x4342;
    shl.b32 codes, codes, SHIFT;
    and.b32 codes, codes, 0x07800780;
    or.b32 codes, codes, 0x40004000;
    or.b32 $1, pair, codes;
}"""
FOUR_BY_LOW_HALVES = tl.constexpr(_FOUR_OF_BF12.replace("SHIFT", "7"))
FOUR_BY_HIGH_HALVES = tl.constexpr(_FOUR_OF_BF12.replace("SHIFT", "3"))


@triton.jit
def bf12_unit(dtype: tl.constexpr):
    """The factor, a power of two, that ``decode_bf12`` leaves out."""
    return 256.0 if dtype == tl.float16 else 64.0


@triton.jit
def decode_bf12(signed, codes, HIGH: tl.constexpr, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Sign and mantissa (uint8) times 2^exponent, over ``bf12_unit``; HIGH: the exponents are the codes' high halves.

    The bits of a float are put together: its sign, an exponent, and the seven bits of bfloat16's mantissa. The unit
    brings the exponents into float16's range, and in wider floats makes the offset that all share a single bit.
    """
    if dtype == tl.bfloat16 and not INTERPRET:
        four: tl.constexpr = FOUR_BY_HIGH_HALVES if HIGH else FOUR_BY_LOW_HALVES
        return tl.inline_asm_elementwise(four, "=r,=r,r,r", [signed, codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        integers: tl.constexpr = tl.int16 if dtype == tl.float16 else tl.int32
        MANTISSA: tl.constexpr = 10 if dtype == tl.float16 else 23
        LEAST: tl.constexpr = 14 if dtype == tl.float16 else 128
        SIGN: tl.constexpr = 15 if dtype == tl.float16 else 31
        bits = signed.to(tl.int8, bitcast=True).to(integers) << (MANTISSA - 7)
        bits ^= (bits >> SIGN) & ((1 << SIGN) - (1 << (MANTISSA - 7)))  # negative weights are in complement
        exponents = (codes >> 4 if HIGH else codes & 15).to(integers)
        bits += (exponents + LEAST) << MANTISSA
        return bits.to(tl.float16 if dtype == tl.float16 else tl.float32, bitcast=True)
