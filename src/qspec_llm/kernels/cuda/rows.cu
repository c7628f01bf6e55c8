// Operations on single rows: the residual add with RMSNorm, and SwiGLU, each with the quantisation of
// its result. A thread holds vectors of 8 columns; sums have one order, given by the width alone.
//
// Defines: WIDTH columns, THREADS, QUANT_GROUP 0, 32, 64 or 128 and TOP: how the result is quantised (0: it is
// written in bf16); HAS_DELTA; WEIGHT_FLOAT: the norm's weight is float32, else bf16.

#include "vector.cuh"

#define VECTORS (WIDTH / 8)
#define ROUNDS ((VECTORS + THREADS - 1) / THREADS)

typedef long long i64;

// Writes vector `at` of a row: its 8 columns as bf16 or quantised. All lanes of a warp call it.
DEVICE void write(const float (&exact)[8], int at, i64 row, u16* out, u8* codes, int2* meta,
                  int pitch) {
  const uint4 rounded = pack(exact);
#if QUANT_GROUP
  float x[8];
  unpack(rounded, x);
  const QuantizedVector quantized(x, at & 1);
  if (at < VECTORS) {
    *(uint2*)(codes + row * WIDTH + at * 8) = quantized.words;
    if (at % (QUANT_GROUP / 8) == 0) meta[(i64)(at / (QUANT_GROUP / 8)) * pitch + row] = quantized.meta;
  }
#else
  if (at < VECTORS) *(uint4*)(out + row * WIDTH + at * 8) = rounded;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(const u16* x, const u16* delta, u16* total, const void* weight, u16* out, u8* codes,
                 int2* meta, int pitch, int stride, int num_heads, float eps) {
  const int thread = threadIdx.x;
  const i64 row = blockIdx.x;
  const u16* from = x + row / num_heads * stride + row % num_heads * WIDTH;
  float values[ROUNDS][8], scale[ROUNDS][8] = {}, sum = 0.f;
  launch_dependents();
  // no kernel writes weights: they come while the kernel before this one still runs
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int at = round * THREADS + thread;
    if (at < VECTORS) {
#if WEIGHT_FLOAT
      *(float4*)scale[round] = ((const float4*)weight)[at * 2];
      *(float4*)(scale[round] + 4) = ((const float4*)weight)[at * 2 + 1];
#else
      unpack(((const uint4*)weight)[at], scale[round]);
#endif
    }
  }
  wait_for_earlier_kernels();
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int at = round * THREADS + thread;
    if (at < VECTORS) {
      unpack(*(const uint4*)(from + at * 8), values[round]);
#if HAS_DELTA
      float more[8];
      unpack(*(const uint4*)(delta + row * WIDTH + at * 8), more);
#pragma unroll
      for (int i = 0; i < 8; i++) values[round][i] += more[i];
      const uint4 rounded = pack(values[round]);
      *(uint4*)(total + row * WIDTH + at * 8) = rounded;
      unpack(rounded, values[round]);
#endif
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) values[round][i] = 0.f;
    }
    sum = add_squares(sum, values[round]);
  }
  sum = sum_of_warp(sum);
#if THREADS > 32
  __shared__ float sums[THREADS / 32];
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  sum = sum_of_warp(thread % 32 < THREADS / 32 ? sums[thread % 32] : 0.f);
#endif
  const float factor = factor_of(sum, WIDTH, eps);
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    const int at = round * THREADS + thread;
    float normed[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
      normed[i] = __fmul_rn(__fmul_rn(values[round][i], factor), scale[round][i]);
    write(normed, at, row, out, codes, meta, pitch);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_mul(const u16* gate_up, u16* out, u8* codes, int2* meta, int pitch) {
  const int at = blockIdx.x * THREADS + threadIdx.x;
  const i64 row = blockIdx.y;
  float product[8] = {};
  launch_dependents();
  wait_for_earlier_kernels();
  if (at < VECTORS) {
    float gate[8], up[8];
    unpack(*(const uint4*)(gate_up + row * 2 * WIDTH + at * 8), gate);
    unpack(*(const uint4*)(gate_up + row * 2 * WIDTH + WIDTH + at * 8), up);
#pragma unroll
    for (int i = 0; i < 8; i++) product[i] = silu_of(gate[i], up[i]);
  }
  write(product, at, row, out, codes, meta, pitch);
}
