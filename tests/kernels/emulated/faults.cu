// Kernels that are wrong, for the test of what an emulated launch says of them.

#include "ptx.cuh"

extern __shared__ __align__(16) u8 shared[];

// 256 bytes are asked for.
extern "C" __global__ void writes_outside(u32*) {
  store_shared(smem_address(shared) + 128 + threadIdx.x * 4, 1.f);
}

extern "C" __global__ void waits_alone(u32*) {
  if (threadIdx.x == 5) __syncthreads();
}

extern "C" __global__ void is_trapped(u32*) {
  if (threadIdx.x == 7) __trap();
}

extern "C" __global__ void waits_for_no_copy(u32* out) {
  const u32 barrier = smem_address(shared);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    bulk_load(barrier + 16, out, 16, barrier + 8);
  }
}

extern "C" __global__ void ends_before_its_copy(u32* out) {
  const u32 barrier = smem_address(shared);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, 16);
    bulk_load(barrier + 16, out, 16, barrier);
  }
}

// Reads what another warp has written, and does not wait for it.
extern "C" __global__ void reads_too_early(u32* out) {
  float* const values = (float*)shared;
  values[threadIdx.x] = 1.f;
  __syncwarp();
  out[threadIdx.x] = __float_as_uint(values[63 - threadIdx.x]);
}
