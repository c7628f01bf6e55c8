// Attention of generated positions, with RoPE and the write of K and V before it and, for drafts, the
// quantisation of its result after it.
//
// The context is split every SPLIT keys. A block takes one split of one KV head of one sequence, for
// all its queries (rows times the query heads that share the KV head), TILE at a time. The block that
// comes last merges the splits in their order. The sums of a query have one order whatever else is
// computed, and a split beyond a query's position adds zeros to them.
//
// Defines: HEAD 64 or 128, NUM_HEADS, NUM_KV, BLOCK_SIZE; ROTATE 1: q, k, v come unrotated, and keys
// from the first row's position on come from them; 0: q is ready and every key is in the cache;
// GROUP 0, 32 or 64 and TOP: how the result is quantised.

#include "ptx.cuh"

#define THREADS 256
#define WARPS 8
#define SPLIT 128
#define TILE 16
#define HALF (HEAD / 2)
#define RATIO (NUM_HEADS / NUM_KV)
#define PITCH (HEAD + 8)       // of rows in shared memory: an odd number of 16-byte units
#define P_PITCH (SPLIT + 8)
#define CHUNKS (HEAD / 8)      // 16-byte pieces of a row
#define COLS (HEAD / WARPS)    // of the result, for a warp
#define MERGED 8               // splits whose partial results are loaded together
#define LOG2E 1.4426950408889634f
#define INFINITE __int_as_float(0x7f800000)

typedef long long i64;

DEVICE void copy_or_zero(u32 to, const void* from, bool is_inside) {
  const u32 bytes = is_inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

DEVICE void load_transposed(u32 (&b)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(at));
}

DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE u32 rotated_pair(u32 low, u32 high, float c, float s) {
  const float a = bf16_to_float(low), b = bf16_to_float(high);
  return float_to_bf16(__fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s))) |
         float_to_bf16(__fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s))) << 16;
}

struct Shared {
  u16 keys[SPLIT][PITCH], values[SPLIT][PITCH], queries[TILE][PITCH], weights[TILE][P_PITCH];
  float tops[WARPS][TILE], sums[WARPS][TILE], result[TILE][HEAD + 4];
  int positions[TILE];
  int num_done;
};

// Writes `count` finished queries, the first of which is query m0 of its sequence.
DEVICE void write(Shared& sh, int count, int m0, i64 first, int kv_head, u16* out, u8* codes,
                  int2* meta, int pitch) {
#if GROUP
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int job = warp; job < count * (HEAD / GROUP); job += WARPS) {
    const int m = job / (HEAD / GROUP), group = job % (HEAD / GROUP);
    const i64 row = first + (m0 + m) / RATIO;
    const int head = kv_head * RATIO + (m0 + m) % RATIO;
    float value[GROUP / 32], top = 0.f;
#pragma unroll
    for (int i = 0; i < GROUP / 32; i++) {
      const float exact = sh.result[m][group * GROUP + i * 32 + lane];
      value[i] = bf16_to_float(float_to_bf16(exact));
      top = fmaxf(top, fabsf(value[i]));
    }
#pragma unroll
    for (int step = 16; step; step >>= 1)
      top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float scale = __fdiv_rn(top, (float)TOP);
    const float divisor = fmaxf(scale, 1.1754943508222875e-38f);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < GROUP / 32; i++) {
      const int code = max(-TOP, min(TOP, __float2int_rn(__fdiv_rn(value[i], divisor))));
      const int col = head * HEAD + group * GROUP + i * 32 + lane;
      codes[row * (NUM_HEADS * HEAD) + (col & ~15) + ((col & 7) << 1) + ((col >> 3) & 1)] = (u8)code;
      sum += code;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0)
      meta[(i64)(head * (HEAD / GROUP) + group) * pitch + row] = make_int2(__float_as_int(scale), sum);
  }
#else
  for (int i = threadIdx.x; i < count * HEAD; i += THREADS) {
    const int m = i / HEAD, d = i % HEAD;
    const i64 row = first + (m0 + m) / RATIO;
    const int head = kv_head * RATIO + (m0 + m) % RATIO;
    out[(row * NUM_HEADS + head) * HEAD + d] = (u16)float_to_bf16(sh.result[m][d]);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const u16* q, const u16* k, const u16* v, int q_stride, int k_stride, int v_stride,
           const float* cosines, const float* sines, u16* key_cache, u16* value_cache, u16* out,
           u8* codes, int2* meta, int pitch, float* part_tops, float* part_sums, float* part_totals,
           int* counters, const i64* positions, const i64* slots, const i64* cu_rows,
           const i64* contexts, const i64* tables, int table_stride, int max_splits, float scale) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& sh = *(Shared*)memory;
  const int split = blockIdx.x, kv_head = blockIdx.y, seq = blockIdx.z;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  launch_dependents();
  wait_for_earlier_kernels();

  const int context = (int)contexts[seq], low = split * SPLIT;
  const i64 first = cu_rows[seq];
  const int num_queries = (int)(cu_rows[seq + 1] - first) * RATIO;
  const int num_splits = (context + SPLIT - 1) / SPLIT;
  if (split >= num_splits) return;
  const int fresh = ROTATE ? (int)positions[first] : context;  // keys from here on are in k and v

  // The cached part of the split; rows past the context are zeros.
#pragma unroll
  for (int i = 0; i < SPLIT * CHUNKS / THREADS; i++) {
    const int at = i * THREADS + thread, n = at / CHUNKS, piece = at % CHUNKS * 8, key = low + n;
    const bool is_cached = key < fresh;
    if (is_cached || key >= context) {
      i64 from = 0;
      if (is_cached) {
        const i64 block = tables[(i64)seq * table_stride + key / BLOCK_SIZE];
        from = ((block * BLOCK_SIZE + key % BLOCK_SIZE) * NUM_KV + kv_head) * HEAD + piece;
      }
      copy_or_zero(smem_address(&sh.keys[n][piece]), key_cache + from, is_cached);
      copy_or_zero(smem_address(&sh.values[n][piece]), value_cache + from, is_cached);
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
#if ROTATE
  // The new part: rotated here, and written to its slots.
  const int new_low = max(low, fresh), new_high = min(low + SPLIT, context);
  for (int i = thread; i < (new_high - new_low) * HALF; i += THREADS) {
    const int key = new_low + i / HALF, pair = i % HALF, n = key - low;
    const i64 row = first + key - fresh, slot = slots[row];
    const u16* from = k + row * k_stride + kv_head * HEAD + pair;
    const u32 turned = rotated_pair(from[0], from[HALF], cosines[(i64)key * HALF + pair],
                                    sines[(i64)key * HALF + pair]);
    const u32 value = *(const u32*)(v + row * v_stride + kv_head * HEAD + 2 * pair);
    sh.keys[n][pair] = (u16)turned;
    sh.keys[n][pair + HALF] = (u16)(turned >> 16);
    *(u32*)&sh.values[n][2 * pair] = value;
    if (slot >= 0) {
      const i64 to = (slot * NUM_KV + kv_head) * HEAD;
      key_cache[to + pair] = (u16)turned;
      key_cache[to + pair + HALF] = (u16)(turned >> 16);
      *(u32*)(value_cache + to + 2 * pair) = value;
    }
  }
#endif

  const int g = lane >> 2, t = lane & 3;
  for (int m0 = 0; m0 < num_queries; m0 += TILE) {
    const int count = min(TILE, num_queries - m0);
    for (int i = thread; i < TILE * HALF; i += THREADS) {
      const int m = i / HALF, pair = i % HALF;
      u32 turned = 0;
      if (m < count) {
        const i64 row = first + (m0 + m) / RATIO;
        const u16* from = q + row * q_stride + (kv_head * RATIO + (m0 + m) % RATIO) * HEAD + pair;
#if ROTATE
        const i64 turn = positions[row] * HALF + pair;
        turned = rotated_pair(from[0], from[HALF], cosines[turn], sines[turn]);
#else
        turned = from[0] | (u32)from[HALF] << 16;
#endif
      }
      sh.queries[m][pair] = (u16)turned;
      sh.queries[m][pair + HALF] = (u16)(turned >> 16);
    }
    if (thread < TILE)
      sh.positions[thread] = thread < count ? (int)positions[first + (m0 + thread) / RATIO] : -1;
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();

    // scores of 16 queries and this warp's 16 keys
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < HEAD / 16; step++) {
      u32 a[4], b[4];
      load_matrices(a, smem_address(&sh.queries[lane & 15][step * 16 + (lane >> 4) * 8]));
      load_matrices(b, smem_address(&sh.keys[warp * 16 + (lane >> 4) * 8 + (lane & 7)]
                                            [step * 16 + ((lane >> 3) & 1) * 8]));
      mma_bf16(scores[0], a, b[0], b[1]);
      mma_bf16(scores[1], a, b[2], b[3]);
    }
    float top[2] = {-INFINITE, -INFINITE};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int position = sh.positions[g + 8 * half];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& score = scores[i >> 1][half * 2 + (i & 1)];
        const int key = low + warp * 16 + (i >> 1) * 8 + 2 * t + (i & 1);
        score = key <= position ? __fmul_rn(score, scale) : -INFINITE;
        top[half] = fmaxf(top[half], score);
      }
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      if (t == 0) sh.tops[warp][g + 8 * half] = top[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float all = -INFINITE, sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) all = fmaxf(all, sh.tops[w][g + 8 * half]);
      const float safe = all == -INFINITE ? 0.f : all;
#pragma unroll
      for (int tile = 0; tile < 2; tile++) {
        const float left = exp2_of(__fmul_rn(scores[tile][half * 2] - safe, LOG2E));
        const float right = exp2_of(__fmul_rn(scores[tile][half * 2 + 1] - safe, LOG2E));
        sum += left + right;
        *(u32*)&sh.weights[g + 8 * half][warp * 16 + tile * 8 + 2 * t] =
            float_to_bf16(left) | float_to_bf16(right) << 16;
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) sh.sums[warp][g + 8 * half] = sum;
      top[half] = all;
    }
    __syncthreads();

    // weighted values: 16 queries and this warp's columns
    float total[COLS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < SPLIT / 16; step++) {
      u32 a[4];
      load_matrices(a, smem_address(&sh.weights[lane & 15][step * 16 + (lane >> 4) * 8]));
#if HEAD == 128
      u32 b[4];
      load_transposed(b, smem_address(&sh.values[step * 16 + (lane & 15)]
                                               [warp * COLS + (lane >> 4) * 8]));
      mma_bf16(total[0], a, b[0], b[1]);
      mma_bf16(total[1], a, b[2], b[3]);
#else
      u32 b[2];
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(b[0]), "=r"(b[1])
                   : "r"(smem_address(&sh.values[step * 16 + (lane & 15)][warp * COLS])));
      mma_bf16(total[0], a, b[0], b[1]);
#endif
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = g + 8 * half;
      if (m < count) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sh.sums[w][m];
        const i64 row = first + (m0 + m) / RATIO;
        const int head = kv_head * RATIO + (m0 + m) % RATIO;
        const i64 part = (row * NUM_HEADS + head) * max_splits + split;
#pragma unroll
        for (int tile = 0; tile < COLS / 8; tile++) {
          const int d = warp * COLS + tile * 8 + 2 * t;
          const float left = total[tile][half * 2], right = total[tile][half * 2 + 1];
          if (num_splits == 1) {
            const float divisor = sum == 0.f ? 1.f : sum;
            sh.result[m][d] = __fdiv_rn(left, divisor);
            sh.result[m][d + 1] = __fdiv_rn(right, divisor);
          } else {
            *(float2*)(part_totals + part * HEAD + d) = make_float2(left, right);
          }
        }
        if (num_splits > 1 && warp == 0 && t == 0) {
          part_tops[part] = top[half];
          part_sums[part] = sum;
        }
      }
    }
    __syncthreads();
    if (num_splits == 1) {
      write(sh, count, m0, first, kv_head, out, codes, meta, pitch);
      __syncthreads();
    }
  }
  if (num_splits == 1) return;

  __threadfence();
  __syncthreads();
  int* counter = counters + seq * NUM_KV + kv_head;
  if (thread == 0) sh.num_done = atomicAdd(counter, 1);
  __syncthreads();
  if (sh.num_done != num_splits - 1) return;
  __threadfence();
  if (thread == 0) *counter = 0;
  const int d = thread % HEAD;
  for (int m0 = 0; m0 < num_queries; m0 += TILE) {
    const int count = min(TILE, num_queries - m0);
    for (int m = thread / HEAD; m < count; m += THREADS / HEAD) {
      const i64 row = first + (m0 + m) / RATIO;
      const int head = kv_head * RATIO + (m0 + m) % RATIO;
      const i64 part = (row * NUM_HEADS + head) * max_splits;
      float top = -INFINITE, sum = 0.f, total = 0.f;
      for (int begin = 0; begin < num_splits; begin += MERGED) {
        float tops[MERGED], sums[MERGED], totals[MERGED], higher = top;
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
          const bool is_in = begin + i < num_splits;
          const i64 at = part + (is_in ? begin + i : 0);
          tops[i] = is_in ? __ldcg(part_tops + at) : -INFINITE;
          sums[i] = __ldcg(part_sums + at);
          totals[i] = __ldcg(part_totals + at * HEAD + d);
          higher = fmaxf(higher, tops[i]);
        }
        const float safe = higher == -INFINITE ? 0.f : higher;
        const float shrink = exp2_of(__fmul_rn(top - safe, LOG2E));
        sum = __fmul_rn(sum, shrink);
        total = __fmul_rn(total, shrink);
#pragma unroll
        for (int i = 0; i < MERGED; i++) {
          const float weight = exp2_of(__fmul_rn(tops[i] - safe, LOG2E));
          sum = __fadd_rn(sum, __fmul_rn(weight, sums[i]));
          total = __fadd_rn(total, __fmul_rn(weight, totals[i]));
        }
        top = higher;
      }
      sh.result[m][d] = __fdiv_rn(total, sum == 0.f ? 1.f : sum);
    }
    __syncthreads();
    write(sh, count, m0, first, kv_head, out, codes, meta, pitch);
    __syncthreads();
  }
}
