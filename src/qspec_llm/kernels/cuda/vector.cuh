// Vectors of 8 columns of a row, as bf16 in 16 bytes or in registers: their quantisation, and what RMSNorm and
// SwiGLU compute of them.
//
// Defines wanted: QUANT_GROUP 0 (a result stays bf16), 32, 64 or 128: columns that share a scale; TOP
// (quantize.cuh).

#pragma once
#include "ptx.cuh"
#include "quantize.cuh"

DEVICE void unpack(const uint4& packed, float (&x)[8]) {
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

DEVICE uint4 pack(const float (&x)[8]) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

#if QUANT_GROUP
// A vector as codes: `words` are this lane's 8 bytes of a row's codes, and the scale and the sum those of
// its group. Lanes hold neighbouring vectors, and all lanes of a warp call it.
struct QuantizedVector {
  uint2 words;
  int2 meta;

  DEVICE QuantizedVector(const float (&x)[8], bool is_upper) {
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
    for (int step = 1; step < QUANT_GROUP / 8; step <<= 1)
      top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const Scale scale(top);
    u32 bits[8], codes[2];
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = scale.usual_code(x[i]);
    if (!scale.is_usual) {
#pragma unroll
      for (int i = 0; i < 8; i++) bits[i] = scale.code(x[i]);
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      codes[i] = permute(permute(bits[4 * i], bits[4 * i + 1], 0x0040),
                         permute(bits[4 * i + 2], bits[4 * i + 3], 0x0040), 0x5410);
      sum = __dp4a((int)codes[i], 0x01010101, sum);
    }
#pragma unroll
    for (int step = 1; step < QUANT_GROUP / 8; step <<= 1) sum += __shfl_xor_sync(~0u, sum, step);
    // of every 16 columns the two halves of 8 are interleaved: neighbours swap four codes
    const u32 other = __shfl_xor_sync(~0u, is_upper ? codes[0] : codes[1], 1);
    const u32 first = is_upper ? other : codes[0], second = is_upper ? codes[1] : other;
    words = make_uint2(permute(first, second, 0x5140), permute(first, second, 0x7362));
    meta = make_int2(__float_as_int(scale.value), sum);
  }
};
#endif

// The squares of a vector added to a sum, in the order of its columns.
DEVICE float add_squares(float sum, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum = __fadd_rn(sum, __fmul_rn(x[i], x[i]));
  return sum;
}

// The sum over a warp's lanes, the same in each.
DEVICE float sum_of_warp(float sum) {
#pragma unroll
  for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
  return sum;
}

// What RMSNorm multiplies a row with, from the sum of its squares.
DEVICE float factor_of(float sum, int width, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)width), eps)));
}

// silu(gate) * up, to 2 ulp.
DEVICE float silu_of(float gate, float up) {
  return __fmul_rn(__fdividef(gate, 1.f + __expf(-gate)), up);
}
