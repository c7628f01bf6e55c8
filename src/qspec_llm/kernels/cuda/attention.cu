// Attention of generated positions, with RoPE and the write of K and V before it and, for drafts, the
// quantisation of its result after it (attention.cuh).
//
// A cluster of CLUSTER blocks holds the lanes of one KV head of one sequence and merges them through its
// shared memory, for QUERIES queries at a time (rows times the query heads that share the KV head).
//
// Places, and old keys and values, are read before earlier kernels have ended: no kernel that starts while
// others still run may write those (matrices.embed, the first of every step, waits for all before it).

#include "attention.cuh"

// All blocks of the cluster, in two halves: what a block wrote before it arrives is visible to all of
// them after they have waited.
DEVICE void arrive() {
#if CLUSTER > 1
  cluster_arrive_release();
#endif
}

DEVICE void wait() {
#if CLUSTER > 1
  cluster_wait();
#else
  __syncthreads();
#endif
}

// A float in the shared memory of block `rank` of the cluster.
DEVICE float remote(const float* p, u32 rank) {
#if CLUSTER > 1
  return load_remote(remote_address(smem_address(p), rank));
#else
  return *p;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MT == 1 ? 2 : 1)
    attend(const u16* q, const u16* k, const u16* v, int q_stride, int k_stride, int v_stride,
           const float* cosines, const float* sines, u16* key_cache, u16* value_cache, u16* out,
           u8* codes, int2* meta, int pitch, const i64* positions, const i64* slots,
           const i64* cu_rows, const i64* contexts, const i64* tables, int table_stride,
           int table_size, float scale) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& sh = *(Shared*)memory;
  const int rank = blockIdx.x, kv_head = blockIdx.y, seq = blockIdx.z;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int team = warp / TEAM, tile = warp % MT, share = warp / MT % SHARES;
  launch_dependents();
#if !ROTATE
  wait_for_earlier_kernels();
#endif
  const Attention p = {q,         k,           v,         q_stride, k_stride, v_stride,
                       cosines,   sines,       key_cache, value_cache,
                       positions, slots,       cu_rows,   contexts, tables,
                       table_stride, table_size, scale};
  const auto meet_block = [&]() { __syncthreads(); };
  const auto wait_for_rows = [&]() { wait_for_earlier_kernels(); };
  const auto finish = [&](const Partial& part, int m0, int count, i64 first) {
    __syncthreads();  // the ring becomes the result
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = tile * 16 + half * 8 + g;
#pragma unroll
      for (int col = 0; col < COLS / 8; col++)
        *(float2*)&sh.result[team][m][share * COLS + col * 8 + 2 * t] =
            make_float2(part.total[col][half * 2], part.total[col][half * 2 + 1]);
      if (share == 0 && t == 0) {
        sh.tops[team][m] = part.tops[half];
        sh.sums[team][m] = part.sums[half * 2];
      }
    }
    arrive();
    wait();
    // a warp merges PART columns of a query, each block its share of them
    const int num_parts = count * (HEAD / PART);
    int i = rank + warp * CLUSTER;
    if (i >= num_parts) arrive();
    while (i < num_parts) {
      const int m = i / (HEAD / PART), first_col = i % (HEAD / PART) * PART;
      Found found;
#pragma unroll
      for (int j = 0; j < LANES; j++)
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
          found.values[j][n] = remote(&sh.result[j / CLUSTER][m][first_col + n * 32 + lane], j % CLUSTER);
      const int other = lane % LANES;
      const bool is_top = lane % (2 * LANES) < LANES;
      const float* from = is_top ? &sh.tops[other / CLUSTER][m] : &sh.sums[other / CLUSTER][m];
      found.mine = remote(from, other % CLUSTER);
      i += CLUSTER * WARPS;
      if (i >= num_parts) arrive();  // its last reads of other blocks
      float all[PER_LANE];
      merge(found, lane, all);
      const int head = kv_head * RATIO + (m0 + m) % RATIO;
      write(all, first + (m0 + m) / RATIO, head * HEAD + first_col, out, codes, meta, pitch);
    }
    wait();
  };
  attend_lanes<false>(sh, p, rank, kv_head, seq, thread, 1, meet_block, wait_for_rows, finish);
}
