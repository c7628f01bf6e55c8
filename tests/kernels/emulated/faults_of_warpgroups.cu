// Warpgroup products that are wrong in one way, for the test of what an emulated launch says of them.
//
// 128 threads; B is 32 tokens x 64 columns in shared memory, of ones.

#include "wgmma.cuh"

extern __shared__ __align__(1024) u8 shared[];

enum { NONE, HOLDS_TOO_EARLY, DOES_NOT_HOLD, DOES_NOT_BEGIN, LACKS_A_WARP, DOES_NOT_WAIT, OVERWRITES };

DEVICE void fill_b(u32 pair) {
  const u32 to = smem_address(shared) + threadIdx.x * 32;
  store_shared4(to, make_uint4(pair, pair, pair, pair));
  store_shared4(to + 16, make_uint4(pair, pair, pair, pair));
}

extern "C" __global__ void products(float* out, int fault) {
  const u32 ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
  const u32 b = x_descriptor(smem_address(shared));
  float sums[4][4] = {};
  fill_b(0x3F803F80u);
  __syncthreads();
  if (fault == LACKS_A_WARP && threadIdx.x / 32 == 2) return;
  if (fault != DOES_NOT_BEGIN) wgmma_begin();
  wgmma_bf16<true>(sums, ones, b);
  wgmma_bf16<true>(sums, ones, b + 2);
  wgmma_commit();
  if (fault == OVERWRITES) {
    __syncthreads();
    fill_b(0x40004000u);
  }
  if (fault == DOES_NOT_WAIT) return;
  if (fault == HOLDS_TOO_EARLY) wgmma_wait<1>();
  else wgmma_wait<0>();
  if (fault != DOES_NOT_HOLD) hold(sums);
  out[threadIdx.x] = sums[3][3];
}
