// Attention of one KV head over kKeys keys. Which keys are reduced together depends on their
// positions alone: in tiles of 16 within the part, one after another. Rows only share the tiles.

constexpr int kTile = 16;

// K or V of some keys of one head, as float: [keys, D].
QSPEC_INLINE void load_tile(const Keys& keys, const void* pool, int64_t head, int64_t first,
                            int64_t count, float* out) {
  const Cache& cache = *keys.cache;
  const int64_t D = cache.head_dim, row = cache.num_kv_heads * D;
  int64_t block = first / cache.block_size, offset = first % cache.block_size;
  int64_t at = (keys.block_table[block] * cache.block_size + offset) * row + head * D;
  for (int64_t i = 0; i < count; ++i, ++offset, at += row) {
    if (offset == cache.block_size) {
      offset = 0;
      at = keys.block_table[++block] * cache.block_size * row + head * D;
    }
    if (cache.type == Type::kF32) {
      const auto* from = static_cast<const float*>(pool) + at;
      for (int64_t d = 0; d < D; d += 16) store(out + i * D + d, load(from + d));
    } else {
      const auto* from = static_cast<const uint16_t*>(pool) + at;
      for (int64_t d = 0; d < D; d += 16) store(out + i * D + d, load_bf16(from + d));
    }
  }
}

// Begin to read what load_tile will: rows of one head lie apart, which no prefetcher foresees.
QSPEC_INLINE void fetch_tile(const Keys& keys, const void* pool, int64_t head, int64_t first,
                             int64_t count) {
  const Cache& cache = *keys.cache;
  const int64_t size = cache.type == Type::kF32 ? 4 : 2, bytes = cache.head_dim * size;
  for (int64_t key = first; key < first + count; ++key) {
    const int64_t slot =
        keys.block_table[key / cache.block_size] * cache.block_size + key % cache.block_size;
    const char* row = static_cast<const char*>(pool) + (slot * cache.num_kv_heads + head) * bytes;
    for (int64_t at = 0; at < bytes; at += 64) prefetch(row + at);
  }
}

constexpr int64_t kMaxHeadDim = 256;

void attend(const Keys& keys, int64_t kv_head, int64_t part, int num_pairs,
            const float* const* queries, const int64_t* positions, Partial* const* partials) {
  const int64_t D = keys.cache->head_dim, start = part * kKeys;
  const V factor = set1(1.0f / sqrtf(static_cast<float>(D)));
  alignas(64) float tile[kTile * kMaxHeadDim];
  alignas(64) float scores[kMaxPairs][kKeys];
  int64_t seen[kMaxPairs], most = 0;  // keys of this part that a pair sees
  for (int p = 0; p < num_pairs; ++p) {
    const int64_t up_to = positions[p] + 1 - start;
    seen[p] = up_to < 0 ? 0 : up_to > kKeys ? kKeys : up_to;
    most = most > seen[p] ? most : seen[p];
  }

  const auto tile_at = [&](int64_t key) { return most - key < kTile ? most - key : kTile; };
  fetch_tile(keys, keys.cache->keys, kv_head, start, most < 2 * kTile ? most : 2 * kTile);
  for (int64_t key = 0; key < most; key += kTile) {
    const int64_t count = tile_at(key);
    fetch_tile(keys, keys.cache->keys, kv_head, start + key + 2 * kTile, tile_at(key + 2 * kTile));
    fetch_tile(keys, keys.cache->values, kv_head, start + key, count);
    load_tile(keys, keys.cache->keys, kv_head, start + key, count, tile);
    for (int64_t i = count * D; i < kTile * D; i += 16) store(tile + i, zero());
    for (int p = 0; p < num_pairs; ++p) {
      if (key >= seen[p]) continue;
      V acc[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) acc[i] = zero();
      for (int64_t d = 0; d < D; d += 16) {
        const V q = mul(load(queries[p] + d), factor);
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) acc[i] = fma(q, load(tile + i * D + d), acc[i]);
      }
      store(scores[p] + key, reduce16(acc));
    }
  }

  for (int p = 0; p < num_pairs; ++p) {
    if (!seen[p]) continue;
    for (int64_t i = seen[p]; i % kTile; ++i) scores[p][i] = -INFINITY;
    V top = load(scores[p]);
    for (int64_t i = kTile; i < seen[p]; i += kTile) top = max(top, load(scores[p] + i));
    partials[p]->max = hmax(top);
    const V max_lanes = set1(partials[p]->max);
    V sum = zero();
    for (int64_t i = 0; i < seen[p]; i += kTile) {
      const V weight = exp_lanes(sub(load(scores[p] + i), max_lanes));
      store(scores[p] + i, weight);
      sum = add(sum, load_n(scores[p] + i, lanes_left(i, seen[p])));
    }
    partials[p]->sum = hsum(sum);
    for (int64_t d = 0; d < D; d += 16) store(partials[p]->values + d, zero());
  }

  for (int64_t key = 0; key < most; key += kTile) {
    const int64_t count = most - key < kTile ? most - key : kTile;
    load_tile(keys, keys.cache->values, kv_head, start + key, count, tile);
    for (int p = 0; p < num_pairs; ++p) {
      const int64_t num_keys = seen[p] - key < kTile ? seen[p] - key : kTile;
      float* out = partials[p]->values;
      const float* weights = scores[p] + key;
      int64_t d = 0;
      for (; d + 64 <= D; d += 64) {
        V acc[4] = {load(out + d), load(out + d + 16), load(out + d + 32), load(out + d + 48)};
        for (int64_t i = 0; i < num_keys; ++i) {
          const V w = set1(weights[i]);
          const float* v = tile + i * D + d;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) acc[j] = fma(w, load(v + 16 * j), acc[j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(out + d + 16 * j, acc[j]);
      }
      for (; d < D; d += 16) {
        V acc = load(out + d);
        for (int64_t i = 0; i < num_keys; ++i) {
          acc = fma(set1(weights[i]), load(tile + i * D + d), acc);
        }
        store(out + d, acc);
      }
    }
  }
}

void merge(Partial& total, const Partial& next, int64_t head_dim) {
  const float top = total.max > next.max ? total.max : next.max;
  alignas(64) float weights[16] = {total.max - top, next.max - top};
  const bool is_old_lost = weights[0] < -87.3f, is_new_lost = weights[1] < -87.3f;
  store(weights, exp_lanes(load(weights)));
  const float old_weight = is_old_lost ? 0.0f : weights[0];
  const float new_weight = is_new_lost ? 0.0f : weights[1];
  total.max = top;
  total.sum = total.sum * old_weight + next.sum * new_weight;
  const V a = set1(old_weight), b = set1(new_weight);
  for (int64_t d = 0; d < head_dim; d += 16) {
    store(total.values + d, fma(load(next.values + d), b, mul(load(total.values + d), a)));
  }
}

void finish(const Partial& total, int64_t head_dim, float* out, bool round) {
  const V sum = set1(total.sum);
  for (int64_t d = 0; d < head_dim; d += 16) put(out + d, div(load(total.values + d), sum), 16, round);
}
