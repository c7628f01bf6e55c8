// Weights of any form as pairs of bf16: operand A of the tensor cores, each value rounded once.

#pragma once
#include "tile.cuh"

#if BITS
// What turns the codes of rows g and g + 8 of a group into weights.
struct Factors {
#if SCALE_HALF
  float scale[2], offset[2];
#else
  u32 scale[2];   // twice in a register
  u32 offset[2];  // s / 2 of exact weights
#endif
};

// The bits of scales and offsets as they are stored, of rows g and g + 8.
DEVICE Factors factors_of(const u32 (&scales)[2], const u32 (&offsets)[2]) {
  Factors f;
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
#if SCALE_HALF
    f.scale[upper] = half_to_float(scales[upper]) * (BITS == 8 ? 1.f / 16.f : 1.f);
    f.offset[upper] = OFFSET ? half_to_float(offsets[upper]) : 0.f;
#elif BITS == 16
    anchor_factors(f.scale[upper], f.offset[upper], scales[upper]);
#else
    f.scale[upper] = PAIR(scales[upper]);
    if (BITS == 8) f.scale[upper] = fma_pair(f.scale[upper], 0x3D803D80u, 0x80008000u);  // / 16
    f.offset[upper] = OFFSET ? PAIR(offsets[upper]) : 0x80008000u;
#endif
  }
  return f;
}

// The weights of one step of 16 columns; fine holds r8 of rows g and g + 8.
DEVICE void weights_of(u32 (&a)[4], u32 codes, u32 r4, const u32 (&fine)[2], const Factors& f) {
#if BITS == 16
  exact_of(a, codes, r4, fine, f.scale, f.offset);
#else
  levels_of(a, codes, r4);
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if SCALE_HALF
    const float low = fmaf(__uint_as_float(a[i] << 16), f.scale[i & 1], f.offset[i & 1]);
    const float high =
        fmaf(__uint_as_float(a[i] & 0xFFFF0000u), f.scale[i & 1], f.offset[i & 1]);
    a[i] = float_to_bf16(low) | float_to_bf16(high) << 16;
#else
    a[i] = fma_pair(a[i], f.scale[i & 1], f.offset[i & 1]);
#endif
  }
#endif
}
#endif
