// x [tokens, columns] to integers for the draft's linears: codes and, per token and group of ACT_GROUP
// columns, {float scale, int sum of codes}. TOP is the largest code; X_FLOAT says that x is float32.
// One warp a group; the arithmetic is reference.quantize_activations, operation by operation.

#include "ptx.cuh"

extern "C" __global__ void quantize(const u8* x, signed char* codes, u8* meta, int num_cols,
                                    int pitch, int num_groups) {
  launch_dependents();
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % 32, token = blockIdx.y;
  const int group = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (group >= num_groups) return;
  const int per_lane = ACT_GROUP / 32;
  float v[per_lane], top = 0.f;
#pragma unroll
  for (int i = 0; i < per_lane; i++) {
    const size_t at = (size_t)token * num_cols + group * ACT_GROUP + lane * per_lane + i;
    v[i] = X_FLOAT ? ((const float*)x)[at] : bf16_to_float(((const u16*)x)[at]);
    top = fmaxf(top, fabsf(v[i]));
  }
#pragma unroll
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const float scale = __fdiv_rn(top, (float)TOP);
  const float divisor = fmaxf(scale, 1.17549435e-38f);
  int sum = 0;
#pragma unroll
  for (int i = 0; i < per_lane; i++) {
    const float rounded = rintf(__fdiv_rn(v[i], divisor));
    const int code = (int)fminf(fmaxf(rounded, -(float)TOP), (float)TOP);
    sum += code;
    // within 16 columns the two halves of 8 are interleaved
    const int column = group * ACT_GROUP + lane * per_lane + i;
    const int to = (column & ~15) | (column & 7) << 1 | (column >> 3 & 1);
    codes[(size_t)token * num_cols + to] = (signed char)code;
  }
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) {
    *(uint2*)(meta + ((size_t)group * pitch + token) * 8) =
        make_uint2(__float_as_uint(scale), (u32)sum);
  }
}
