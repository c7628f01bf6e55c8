// Attention of generated positions, with RoPE and the write of K and V before it and, for drafts, the
// quantisation of its result after it.
//
// The keys are cut into chunks of CHUNK, and chunk c belongs to lane c % LANES. A lane takes its chunks
// in order with a running maximum (Milakov and Gimelshein 2018); then the lanes are merged in their
// order. So which keys meet in which order depends on their positions alone, and keys beyond a query
// change nothing: its result is the same whatever is computed with it. A cluster of CLUSTER blocks
// shares the lanes of one KV head of one sequence, which changes no sum, and merges through each
// other's shared memory, for QUERIES queries at a time (rows times the query heads that share the KV
// head). While a chunk is computed the next ones are on their way.
//
// Defines: HEAD 64 or 128, NUM_HEADS, NUM_KV, BLOCK_SIZE; MT: QUERIES = 16 MT; CLUSTER 1, 2, 4 or
// 8; ROTATE 1: q, k, v come unrotated, and keys from the first row's position on
// come from them; 0: q is ready and every key is in the cache; GROUP 0, 32 or 64 and TOP: how the
// result is quantised.

#include "ptx.cuh"

#define THREADS 256
#define WARPS 8
#define CHUNK 64
#define STAGES 4  // chunks in shared memory: one is computed, the others are on their way
#define LANES 8
#define SLOTS (LANES / CLUSTER)  // lanes of a block
#define QUERIES (16 * MT)
#define HALF (HEAD / 2)
#define RATIO (NUM_HEADS / NUM_KV)
#define PITCH (HEAD + 8)     // of rows in shared memory: an odd number of 16-byte units
#define W_PITCH (CHUNK + 8)
#define PIECES (HEAD / 8)    // 16-byte pieces of a row
#define COLS (HEAD / WARPS)  // of the result, for a warp
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
  float result[SLOTS][QUERIES][HEAD + 4];  // other blocks read it, and tops and sums
  float tops[SLOTS][QUERIES], sums[SLOTS][QUERIES];
  float warp_tops[WARPS][QUERIES], warp_sums[WARPS][QUERIES];
  int positions[QUERIES];
  u16 queries[QUERIES][PITCH], weights[QUERIES][W_PITCH];
  u16 keys[STAGES][CHUNK][PITCH], values[STAGES][CHUNK][PITCH];
};

struct Sequence {
  i64 first;  // its first row
  int num_queries, context, fresh, kv_head, index;
};

DEVICE i64 row_of(const Sequence& seq, int query) { return seq.first + query / RATIO; }
DEVICE int head_of(const Sequence& seq, int query) { return seq.kv_head * RATIO + query % RATIO; }

// One finished query, by one warp: columns lane, lane + 32, ...
DEVICE void write(const float (&exact)[HEAD / 32], const Sequence& seq, int query, u16* out, u8* codes,
                  int2* meta, int pitch) {
  const int lane = threadIdx.x & 31;
  const i64 row = row_of(seq, query);
  const int head = head_of(seq, query);
#if GROUP
#pragma unroll
  for (int group = 0; group < HEAD / GROUP; group++) {
    float value[GROUP / 32], top = 0.f;
#pragma unroll
    for (int i = 0; i < GROUP / 32; i++) {
      value[i] = bf16_to_float(float_to_bf16(exact[group * (GROUP / 32) + i]));
      top = fmaxf(top, fabsf(value[i]));
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    const float scale = __fdiv_rn(top, (float)TOP);
    const float divisor = fmaxf(scale, 1.1754943508222875e-38f);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < GROUP / 32; i++) {
      const int code = max(-TOP, min(TOP, __float2int_rn(__fdiv_rn(value[i], divisor))));
      const int col = head * HEAD + group * GROUP + i * 32 + lane;
      // of every 16 columns the two halves of 8 are interleaved
      codes[row * (NUM_HEADS * HEAD) + (col & ~15) + ((col & 7) << 1) + ((col >> 3) & 1)] = (u8)code;
      sum += code;
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0)
      meta[(i64)(head * (HEAD / GROUP) + group) * pitch + row] = make_int2(__float_as_int(scale), sum);
  }
#else
#pragma unroll
  for (int i = 0; i < HEAD / 32; i++)
    out[(row * NUM_HEADS + head) * HEAD + i * 32 + lane] = (u16)float_to_bf16(exact[i]);
#endif
}

// All blocks of the cluster: what they wrote before is visible after.
DEVICE void meet() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __syncthreads();
#endif
}

// A float in the shared memory of block `rank` of the cluster.
DEVICE float remote(const float* p, u32 rank) {
#if CLUSTER > 1
  float value;
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(value)
               : "r"(address)
               : "memory");
  return value;
#else
  return *p;
#endif
}

// The chunk after `chunk` in a block's order: the same lane's next one, or its next lane's first one.
DEVICE int chunk_after(int chunk, int num_chunks) {
  if (chunk + LANES < num_chunks) return chunk + LANES;
  const int lane = chunk % LANES + CLUSTER;
  return lane < LANES && lane < num_chunks ? lane : num_chunks;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const u16* q, const u16* k, const u16* v, int q_stride, int k_stride, int v_stride,
           const float* cosines, const float* sines, u16* key_cache, u16* value_cache, u16* out,
           u8* codes, int2* meta, int pitch, const i64* positions, const i64* slots,
           const i64* cu_rows, const i64* contexts, const i64* tables, int table_stride,
           float scale) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& sh = *(Shared*)memory;
  const int rank = blockIdx.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  launch_dependents();
  wait_for_earlier_kernels();

  Sequence seq;
  seq.index = blockIdx.z;
  seq.kv_head = blockIdx.y;
  seq.context = (int)contexts[seq.index];
  seq.first = cu_rows[seq.index];
  seq.num_queries = (int)(cu_rows[seq.index + 1] - seq.first) * RATIO;
  if (seq.context == 0) return;  // the whole cluster
  const int first_position = (int)positions[seq.first];
  seq.fresh = ROTATE ? first_position : seq.context;  // later keys are in k and v
  const int num_chunks = (seq.context + CHUNK - 1) / CHUNK;
  const i64* table = tables + (i64)seq.index * table_stride;

  // Starts the copies of what is cached of a chunk; rows past the context are zeros.
  auto fetch = [&](int chunk, int buffer) {
    if (chunk < num_chunks) {
      const int last = (seq.context - 1) / BLOCK_SIZE;
      i64 blocks[CHUNK * PIECES / THREADS];  // all asked for before the first is needed
#pragma unroll
      for (int i = 0; i < CHUNK * PIECES / THREADS; i++)
        blocks[i] = table[min((chunk * CHUNK + (i * THREADS + thread) / PIECES) / BLOCK_SIZE, last)];
#pragma unroll
      for (int i = 0; i < CHUNK * PIECES / THREADS; i++) {
        const int at = i * THREADS + thread, n = at / PIECES, piece = at % PIECES * 8;
        const int key = chunk * CHUNK + n;
        const bool is_cached = key < seq.fresh;
        const i64 slot = blocks[i] * BLOCK_SIZE + key % BLOCK_SIZE;
        const i64 from = (slot * NUM_KV + seq.kv_head) * HEAD + piece;
        if (is_cached || key >= seq.context) {
          copy_or_zero(smem_address(&sh.keys[buffer][n][piece]), key_cache + from, is_cached);
          copy_or_zero(smem_address(&sh.values[buffer][n][piece]), value_cache + from, is_cached);
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  for (int m0 = 0; m0 < seq.num_queries; m0 += QUERIES) {
    const int count = min(QUERIES, seq.num_queries - m0);
    int chunk = rank < num_chunks ? rank : num_chunks, buffer = 0, coming = chunk;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
      fetch(coming, i);
      coming = coming < num_chunks ? chunk_after(coming, num_chunks) : num_chunks;
    }
    // the queries of this turn
#pragma unroll
    for (int i = 0; i < QUERIES * HALF / THREADS; i++) {
      const int m = (i * THREADS + thread) / HALF, pair = (i * THREADS + thread) % HALF;
      const int query = m0 + min(m, count - 1);
      const u16* from = q + row_of(seq, query) * q_stride + head_of(seq, query) * HEAD + pair;
      u32 turned = 0;
#if ROTATE
      // rows of a sequence follow each other; what lies past the context is no row that counts
      const i64 turn = (i64)min(first_position + query / RATIO, seq.context - 1) * HALF + pair;
      turned = rotated_pair(from[0], from[HALF], cosines[turn], sines[turn]);
#else
      turned = from[0] | (u32)from[HALF] << 16;
#endif
      if (m >= count) turned = 0;
      sh.queries[m][pair] = (u16)turned;
      sh.queries[m][pair + HALF] = (u16)(turned >> 16);
    }
    if (thread < QUERIES)
      sh.positions[thread] = thread < count ? first_position + (m0 + thread) / RATIO : -1;

    float total[MT][COLS / 8][4] = {}, tops[MT][2], sums[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) tops[i / 2][i % 2] = -INFINITE, sums[i / 2][i % 2] = 0.f;

    while (chunk < num_chunks) {
      const int low = chunk * CHUNK, after = chunk_after(chunk, num_chunks);
#if ROTATE
      // what is new: rotated here, and written to its slots
      const int new_low = max(low, seq.fresh), new_high = min(low + CHUNK, seq.context);
      for (int i = thread; i < (new_high - new_low) * HALF; i += THREADS) {
        const int key = new_low + i / HALF, pair = i % HALF, n = key - low;
        const i64 row = seq.first + key - seq.fresh, slot = slots[row];
        const u16* from = k + row * k_stride + seq.kv_head * HEAD + pair;
        const u32 turned = rotated_pair(from[0], from[HALF], cosines[(i64)key * HALF + pair],
                                        sines[(i64)key * HALF + pair]);
        const u32 value = *(const u32*)(v + row * v_stride + seq.kv_head * HEAD + 2 * pair);
        sh.keys[buffer][n][pair] = (u16)turned;
        sh.keys[buffer][n][pair + HALF] = (u16)(turned >> 16);
        *(u32*)&sh.values[buffer][n][2 * pair] = value;
        if (slot >= 0) {
          const i64 to = (slot * NUM_KV + seq.kv_head) * HEAD;
          key_cache[to + pair] = (u16)turned;
          key_cache[to + pair + HALF] = (u16)(turned >> 16);
          *(u32*)(value_cache + to + 2 * pair) = value;
        }
      }
#endif
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      __syncthreads();
      fetch(coming, (buffer + STAGES - 1) % STAGES);  // where the chunk before this one was
      coming = coming < num_chunks ? chunk_after(coming, num_chunks) : num_chunks;

      // scores of all queries and this warp's 8 keys
      float scores[MT][4] = {};
#pragma unroll
      for (int step = 0; step < HEAD / 32; step++) {
        u32 b[4];
        load_matrices(b, smem_address(&sh.keys[buffer][warp * 8 + (lane & 7)]
                                              [step * 32 + (lane >> 3) * 8]));
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
          u32 a[4];
          load_matrices(a, smem_address(&sh.queries[mt * 16 + (lane & 15)]
                                                   [step * 32 + (lane >> 4) * 8]));
          mma_bf16(scores[mt], a, b[0], b[1]);
          load_matrices(a, smem_address(&sh.queries[mt * 16 + (lane & 15)]
                                                   [step * 32 + 16 + (lane >> 4) * 8]));
          mma_bf16(scores[mt], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int part = 0; part < 2 * MT; part++) {
        const int mt = part / 2, half = part % 2, m = mt * 16 + half * 8 + g;
        const int position = sh.positions[m];
        float top = -INFINITE;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[mt][half * 2 + i];
          const int key = low + warp * 8 + 2 * t + i;
          score = key <= position ? __fmul_rn(score, scale) : -INFINITE;
          top = fmaxf(top, score);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        if (t == 0) sh.warp_tops[warp][m] = top;
      }
      __syncthreads();
#pragma unroll
      for (int part = 0; part < 2 * MT; part++) {
        const int mt = part / 2, half = part % 2, m = mt * 16 + half * 8 + g;
        float top = tops[mt][half];
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, sh.warp_tops[w][m]);
        const float safe = top == -INFINITE ? 0.f : top;
        const float shrink = exp2_of(__fmul_rn(tops[mt][half] - safe, LOG2E));
        tops[mt][half] = top;
        const float left = exp2_of(__fmul_rn(scores[mt][half * 2] - safe, LOG2E));
        const float right = exp2_of(__fmul_rn(scores[mt][half * 2 + 1] - safe, LOG2E));
        *(u32*)&sh.weights[m][warp * 8 + 2 * t] = float_to_bf16(left) | float_to_bf16(right) << 16;
        float sum = __fadd_rn(left, right);
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 1));
        sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, 2));
        if (t == 0) sh.warp_sums[warp][m] = sum;
        sums[mt][half] = __fmul_rn(sums[mt][half], shrink);
#pragma unroll
        for (int tile = 0; tile < COLS / 8; tile++) {
          total[mt][tile][half * 2] = __fmul_rn(total[mt][tile][half * 2], shrink);
          total[mt][tile][half * 2 + 1] = __fmul_rn(total[mt][tile][half * 2 + 1], shrink);
        }
      }
      __syncthreads();
#pragma unroll
      for (int part = 0; part < 2 * MT; part++) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
          sum = __fadd_rn(sum, sh.warp_sums[w][part / 2 * 16 + part % 2 * 8 + g]);
        sums[part / 2][part % 2] = __fadd_rn(sums[part / 2][part % 2], sum);
      }
      // weighted values: all queries and this warp's columns
#pragma unroll
      for (int step = 0; step < CHUNK / 16; step++) {
#if HEAD == 128
        u32 b[4];
        load_transposed(b, smem_address(&sh.values[buffer][step * 16 + (lane & 15)]
                                                  [warp * COLS + (lane >> 4) * 8]));
#else
        u32 b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b[0]), "=r"(b[1])
                     : "r"(smem_address(&sh.values[buffer][step * 16 + (lane & 15)][warp * COLS])));
#endif
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
          u32 a[4];
          load_matrices(a, smem_address(&sh.weights[mt * 16 + (lane & 15)]
                                                   [step * 16 + (lane >> 4) * 8]));
#pragma unroll
          for (int tile = 0; tile < COLS / 8; tile++)
            mma_bf16(total[mt][tile], a, b[2 * tile], b[2 * tile + 1]);
        }
      }
      if (after % LANES != chunk % LANES || after == num_chunks) {  // the lane is done
        const int slot = chunk % LANES / CLUSTER;
#pragma unroll
        for (int part = 0; part < 2 * MT; part++) {
          const int mt = part / 2, half = part % 2, m = mt * 16 + half * 8 + g;
#pragma unroll
          for (int tile = 0; tile < COLS / 8; tile++) {
            *(float2*)&sh.result[slot][m][warp * COLS + tile * 8 + 2 * t] =
                make_float2(total[mt][tile][half * 2], total[mt][tile][half * 2 + 1]);
            total[mt][tile][half * 2] = total[mt][tile][half * 2 + 1] = 0.f;
          }
          if (warp == 0 && t == 0) {
            sh.tops[slot][m] = tops[mt][half];
            sh.sums[slot][m] = sums[mt][half];
          }
          tops[mt][half] = -INFINITE;
          sums[mt][half] = 0.f;
        }
      }
      chunk = after;
      buffer = (buffer + 1) % STAGES;
    }
    meet();
    // a warp merges a query, each block its share of them
    for (int m = rank + warp * CLUSTER; m < count; m += CLUSTER * WARPS) {
      float lane_tops[LANES], lane_sums[LANES], lanes[LANES][HEAD / 32], top = -INFINITE;
#pragma unroll
      for (int i = 0; i < LANES; i++) {
        const bool is_used = i < num_chunks;  // others were never written
        lane_tops[i] = is_used ? remote(&sh.tops[i / CLUSTER][m], i % CLUSTER) : -INFINITE;
        lane_sums[i] = is_used ? remote(&sh.sums[i / CLUSTER][m], i % CLUSTER) : 0.f;
#pragma unroll
        for (int j = 0; j < HEAD / 32; j++)
          lanes[i][j] =
              is_used ? remote(&sh.result[i / CLUSTER][m][j * 32 + lane], i % CLUSTER) : 0.f;
        top = fmaxf(top, lane_tops[i]);
      }
      const float safe = top == -INFINITE ? 0.f : top;
      float sum = 0.f, all[HEAD / 32] = {};
#pragma unroll
      for (int i = 0; i < LANES; i++) {
        const float weight = exp2_of(__fmul_rn(lane_tops[i] - safe, LOG2E));
        sum = __fadd_rn(sum, __fmul_rn(weight, lane_sums[i]));
#pragma unroll
        for (int j = 0; j < HEAD / 32; j++)
          all[j] = __fadd_rn(all[j], __fmul_rn(weight, lanes[i][j]));
      }
#pragma unroll
      for (int j = 0; j < HEAD / 32; j++) all[j] = __fdiv_rn(all[j], sum == 0.f ? 1.f : sum);
      write(all, seq, m0 + m, out, codes, meta, pitch);
    }
    meet();
  }
}
