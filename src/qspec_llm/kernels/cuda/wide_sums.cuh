// What becomes of a range's sums: totals of shares in shared memory, sums and totals that thread blocks of the
// same rows leave for each other, results.

#pragma once
#include "wide_work.cuh"

// Four sums of a lane: rows g and g + 8 of its warp's 16, two tokens.
DEVICE void store_sums(const Problem& p, int block, const Lane& l, int n, const float (&sum)[4],
                       const float (&bias)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = (block * WARPS + l.warp) * TILE_ROWS + l.g + 8 * (i >> 1);
    const int token = blockIdx.y * TOKENS + n * 8 + 2 * l.t + (i & 1);
    if (token >= p.num_tokens || row >= p.num_rows) continue;
    const float value = sum[i] + bias[i >> 1];
    const size_t at = (size_t)token * p.num_rows + row;
    if (p.out_is_float) ((float*)p.out)[at] = value;
    else ((u16*)p.out)[at] = float_to_bf16(value);
  }
}

DEVICE void bias_of_rows(float (&bias)[2], const Problem& p, int block, const Lane& l) {
  const int row = (block * WARPS + l.warp) * TILE_ROWS + l.g;
  bias[0] = bias_or_zero(p, row), bias[1] = bias_or_zero(p, row + 8);
}

// This lane's sums in the workspace, [n][thread].
DEVICE void write_sums(float4* to, const Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    __stcg(to + n * THREADS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
  }
}

// A total for the same warp of the next thread block, which goes on from there.
DEVICE void pass_on(const Problem& p, const Lane& l, const Accumulators& total, int block) {
  write_sums(p.parts + (size_t)place_of(p, block) * ITEMS + threadIdx.x, total);
  __syncwarp();
  if (l.lane == 0) store_release(p.flags + place_of(p, block) * WARPS + l.warp, 1);
}

// What the thread block before this one passed on; acc is added to it.
DEVICE void go_on(const Problem& p, const Lane& l, Accumulators& acc, int block) {
  u32* flag = p.flags + place_of(p, block) * WARPS + l.warp;
  if (l.lane == 0) {
    while (!load_acquire(flag)) {
    }
    *flag = 0;
  }
  __syncwarp();
  const float4* from = p.parts + (size_t)place_of(p, block) * ITEMS + threadIdx.x;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float4 before = __ldcg(from + n * THREADS);
    acc[n][0] = before.x + acc[n][0], acc[n][1] = before.y + acc[n][1];
    acc[n][2] = before.z + acc[n][2], acc[n][3] = before.w + acc[n][3];
  }
}

// The total of a share so far lies in shared memory, [n][thread]: `totals` is this thread's place.
DEVICE void add_total(Accumulators& acc, u32 totals) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 before = load_shared4(totals + n * (THREADS * 16));
    acc[n][0] = __uint_as_float(before.x) + acc[n][0];
    acc[n][1] = __uint_as_float(before.y) + acc[n][1];
    acc[n][2] = __uint_as_float(before.z) + acc[n][2];
    acc[n][3] = __uint_as_float(before.w) + acc[n][3];
  }
}

DEVICE void keep_total(u32 totals, const Accumulators& acc) {
#pragma unroll
  for (int n = 0; n < NT; n++) store_shared4(totals + n * (THREADS * 16), acc[n]);
}

// A range of a share is summed.
DEVICE void end_range(const Problem& p, const Lane& l, Accumulators& acc, u32 totals,
                      const Share& share, int range) {
  if (range > share.first) {
    if (share.first == 0 || p.passes) add_total(acc, totals);
  } else if (share.first > 0 && p.passes) {
    go_on(p, l, acc, share.block);
  }
  if (share.first > 0 && !p.passes) {
    const size_t at = (size_t)place_of(p, share.block) * RANGES + range;
    write_sums(p.parts + at * ITEMS + threadIdx.x, acc);
  } else if (range + 1 < share.last) {
    keep_total(totals, acc);
  } else if (share.last == RANGES) {
    float bias[2];
    bias_of_rows(bias, p, share.block, l);
#pragma unroll
    for (int n = 0; n < NT; n++) store_sums(p, share.block, l, n, acc[n], bias);
  } else if (p.passes) {
    pass_on(p, l, acc, share.block);
  } else {  // the total takes the place of range 0
    write_sums(p.parts + (size_t)place_of(p, share.block) * RANGES * ITEMS + threadIdx.x, acc);
  }
  clear(acc);
}

// This block's sums of `count` ranges of some rows are in the workspace. Thread 0 gets the largest count
// that says that not all are: never 0, although counts begin again after the largest number.
DEVICE u32 arrive(const Problem& p, int block, u32 count) {
  __syncthreads();
  u32 seen = 0;
  if (threadIdx.x == 0) seen = add_and_order(p.arrivals + place_of(p, block), count);
  return (seen / RANGES + 1) * RANGES - 1;
}

// Wait for all ranges of a block of rows, then add them up and store this thread block's slice.
DEVICE void fold(const Problem& p, int block, u32 too_few) {
  if (threadIdx.x == 0) {
    while ((int)(load_acquire(p.arrivals + place_of(p, block)) - too_few) <= 0) {
    }
  }
  __syncthreads();
  const int head = owner_of(p, block * RANGES), tail = owner_of(p, block * RANGES + RANGES - 1);
  const int next_range = first_unit(p, head + 1) - block * RANGES;  // behind the head's total
  const int sharers = tail - head + 1, rank = blockIdx.x - head;
  const float4* from = p.parts + (size_t)place_of(p, block) * RANGES * ITEMS;
  const int stop = ITEMS * (rank + 1) / sharers;
  for (int item = ITEMS * rank / sharers + threadIdx.x; item < stop; item += THREADS) {
    float4 part[RANGES];
#pragma unroll
    for (int r = 0; r < RANGES; r++) {
      if (r == 0 || r >= next_range) part[r] = __ldcg(from + (size_t)r * ITEMS + item);
    }
    float sum[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
    for (int r = 1; r < RANGES; r++) {
      if (r < next_range) continue;
      sum[0] += part[r].x, sum[1] += part[r].y, sum[2] += part[r].z, sum[3] += part[r].w;
    }
    const Lane l = lane_of(item % THREADS);
    float bias[2];
    bias_of_rows(bias, p, block, l);
    store_sums(p, block, l, item / THREADS, sum, bias);
  }
}
