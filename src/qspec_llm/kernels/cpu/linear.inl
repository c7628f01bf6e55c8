// Linear layers. Sixteen rows of the matrix lie in the lanes; every row of x has its own
// accumulators and meets the columns in the same order however many rows go together, so its result
// does not depend on the others. Threads split the panels, never the columns.

// Rows [first, first + count) go through a kernel together. Blocks are of nearly equal size: 9 rows
// go as 5 and 4, not as 8 and 1.
struct RowBlock {
  int64_t first, count;
};
QSPEC_INLINE RowBlock row_block(int64_t num_rows, int64_t most, int64_t row) {
  const int64_t num_blocks = (num_rows + most - 1) / most;
  const int64_t block = ((row + 1) * num_blocks - 1) / num_rows;
  const int64_t first = num_rows * block / num_blocks;
  return {first, num_rows * (block + 1) / num_blocks - first};
}

// How far ahead of its use a plane is fetched, in bytes of that plane: into the first-level cache,
// which can wait for 16 lines only, and into the second, one page on, where the prefetchers of the
// hardware begin anew. Measured: docs/cpu-notes.md.
constexpr int64_t kAhead = 1024, kFarAhead = 4096, kScalesAhead = 128;
// Kernels with more arithmetic than that leave the memory time enough.
constexpr int64_t kExactAhead = 2048;

QSPEC_INLINE void fetch_ahead(const uint8_t* plane) {
  prefetch(plane + kAhead);
  prefetch_far(plane + kFarAhead);
}

QSPEC_INLINE V load_scale(const uint16_t* p, Type type) {
  return type == Type::kBF16 ? load_bf16(p) : load_f16(p);
}

// Eight columns of unsigned levels: `low` columns 0..3, `high` columns 4..7, four to a lane.
template <bool SIGNED, bool EIGHT>
QSPEC_INLINE void levels(const uint8_t* q4, const uint8_t* r4, I& low, I& high) {
  const I nibble = set1_i(0x0F0F0F0F);
  I q = load_i(q4);
  // v + 7 = c - (c >> 3), both nibbles of a byte at once: no borrow, as c >= 8 where 1 is taken
  if constexpr (SIGNED) q = sub_i(q, and_i(shr<3>(q), set1_i(0x11111111)));
  if constexpr (EIGHT) {
    const I r = load_i(r4), high_nibble = set1_i(static_cast<int32_t>(0xF0F0F0F0));
    low = add_i(and_i(shl<4>(q), high_nibble), and_i(r, nibble));
    high = add_i(and_i(q, high_nibble), and_i(shr<4>(r), nibble));
  } else {
    low = and_i(q, nibble);
    high = and_i(shr<4>(q), nibble);
  }
}

// Integer levels times integer activations: a block of rows against one panel, into acc. `x` is the
// block's part of each array; STEP columns share the scales of both sides.
template <bool SIGNED, bool EIGHT, int LIMBS, int M, int STEP>
QSPEC_INLINE void integer_panel(const Matrix& w, const Limbs& x, int64_t panel, V* out) {
  const int64_t K = w.num_cols, num_groups = K / w.group;
  const uint8_t* q4 = w.q4 + panel * K * (kPanel / 2);
  const uint8_t* r4 = EIGHT ? w.r4 + panel * K * (kPanel / 2) : nullptr;
  const uint16_t* scale = w.scale + panel * num_groups * kPanel;
  const uint16_t* offset = w.offset ? w.offset + panel * num_groups * kPanel : nullptr;
  const int8_t* xs = x.bytes;
  const float *x_scale = x.scale, *x_total = x.total;
  // Levels are unsigned here: what that adds is taken off again, in units of the scale. Where one
  // code stands for 16, the draft takes their middle.
  float zero_point = SIGNED ? (EIGHT ? -120.0f : -7.0f) : offset ? 0.0f : EIGHT ? -128.0f : -8.0f;
  if (!SIGNED && !EIGHT && w.bits == 8) zero_point += 7.5f / 16;
  const V zero_lanes = set1(zero_point), unit = set1(1.0f / 16);
  const int64_t steps_in_group = w.group / STEP;
  int64_t steps_left = 0;
  V s = zero(), b = zero(), acc[M];  // not `out`, which would be written every time
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m] = zero();

  for (int64_t k0 = 0; k0 < K; k0 += STEP) {
    I dots[LIMBS][M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
      for (int l = 0; l < LIMBS; ++l) dots[l][m] = zero_i();
    }
#pragma GCC unroll 8
    for (int i = 0; i < STEP / 8; ++i) {
      I low, high;
      fetch_ahead(q4);
      if constexpr (EIGHT) fetch_ahead(r4);
      levels<SIGNED, EIGHT>(q4, r4, low, high);
      q4 += 4 * kPanel;
      if constexpr (EIGHT) r4 += 4 * kPanel;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
        for (int l = 0; l < LIMBS; ++l) {
          const int8_t* bytes = xs + (m * LIMBS + l) * 8;
          if constexpr (EIGHT) dots[l][m] = dot_u8(dot_u8(dots[l][m], low, bytes), high, bytes + 4);
          else dots[l][m] = dot_u4(dot_u4(dots[l][m], low, bytes), high, bytes + 4);
        }
      }
      xs += M * LIMBS * 8;
    }
    if (steps_left == 0) {
      steps_left = steps_in_group;
      s = load_scale(scale, w.type);
      prefetch(scale + kScalesAhead);
      if constexpr (EIGHT) s = mul(s, unit);
      b = mul(s, zero_lanes);
      if (offset) {
        b = add(b, load_scale(offset, w.type));
        prefetch(offset + kScalesAhead);
        offset += kPanel;
      }
      scale += kPanel;
    }
    --steps_left;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      V dot;
      if constexpr (LIMBS == 1) dot = to_float(dots[0][m]);
      else if constexpr (LIMBS == 2) dot = to_float(add_i(shl<8>(dots[0][m]), dots[1][m]));
      else
        dot = fma(to_float(dots[0][m]), set1(65536.0f),
                  fma(to_float(dots[1][m]), set1(256.0f), to_float(dots[2][m])));
      acc[m] = fma(mul(dot, set1(x_scale[m])), s, acc[m]);
      acc[m] = fma(b, set1(x_total[m]), acc[m]);
      if constexpr (STEP == 64) acc[m] = fma(b, set1(x_total[M + m]), acc[m]);
    }
    x_scale += M * (STEP / 32);
    x_total += M * (STEP / 32);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m] = acc[m];
}

// Weight of column J of 8, exactly as the checkpoint had it. `s` has one significand of 8 bits, so
// s_up = (2^16 + 1) s is exact; level s_up is rounded once, to 24 bits, which rounds its low part
// level s to 8 bits, ties to even: that is the anchor, once the high part is taken off. Levels carry
// a factor of 16 and residuals are stored complemented: 2^28 - (C + 1) 2^16 is 4 octaves, which that
// factor supplies, so bits(w) = bits(16 anchor) - complement.
template <int J>
QSPEC_INLINE V exact_weight(I q4, I n4, I n8, V s_up, V s_high) {
  constexpr int from = 8 * (J & 3) + (J >= 4 ? 4 : 0);
  const V level = anchor_level(shr<from>(q4));
  const V rounded = mul(level, s_up);
  return apply_residual(fnma(level, s_high, rounded), residual<J>(n4, n8));
}

// Column J of 8 for M rows; x [M][8].
template <int M, int J>
QSPEC_INLINE void exact_column(I q4, I n4, I n8, V s_up, V s_high, const float* x, V (*acc)[2]) {
  const V w = exact_weight<J>(q4, n4, n8, s_up, s_high);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m][J & 1] = fma(set1(x[m * 8 + J]), w, acc[m][J & 1]);
}

// Exact bf16 weights times float activations.
template <int M>
QSPEC_INLINE void exact_panel(const Matrix& w, const Input& in, int64_t row, int64_t panel, V* out) {
  const int64_t K = w.num_cols;
  const uint8_t* q4 = w.q4 + panel * K * (kPanel / 2);
  const uint8_t* n4 = w.r4 + panel * K * (kPanel / 2);
  const uint8_t* n8 = w.r8 + panel * K * kPanel;
  const uint16_t* scale = w.scale + panel * (K / w.group) * kPanel;
  const float* x = in.wide + row * K;
  V acc[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  for (int64_t k0 = 0; k0 < K; k0 += w.group, scale += kPanel) {
    const V s = load_bf16(scale);
    const V s_up = mul(s, set1(65537.0f)), s_high = mul(s, set1(65536.0f));
    for (int64_t k = k0; k < k0 + w.group; k += 8) {
      prefetch(q4 + kExactAhead);
      prefetch(n4 + kExactAhead);
      prefetch(n8 + kExactAhead);
      prefetch(n8 + kExactAhead + 64);
      const I q = load_i(q4), n = load_i(n4), first = load_i(n8), second = load_i(n8 + 4 * kPanel);
      exact_column<M, 0>(q, n, first, s_up, s_high, x, acc);
      exact_column<M, 1>(q, n, first, s_up, s_high, x, acc);
      exact_column<M, 2>(q, n, first, s_up, s_high, x, acc);
      exact_column<M, 3>(q, n, first, s_up, s_high, x, acc);
      exact_column<M, 4>(q, n, second, s_up, s_high, x, acc);
      exact_column<M, 5>(q, n, second, s_up, s_high, x, acc);
      exact_column<M, 6>(q, n, second, s_up, s_high, x, acc);
      exact_column<M, 7>(q, n, second, s_up, s_high, x, acc);
      q4 += 4 * kPanel;
      n4 += 4 * kPanel;
      n8 += 8 * kPanel;
      x += 8 * M;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m] = add(acc[m][0], acc[m][1]);
}

template <Type TYPE>
QSPEC_INLINE V load_dense(const void* p, int64_t index) {
  if constexpr (TYPE == Type::kF32) return load(static_cast<const float*>(p) + index);
  else if constexpr (TYPE == Type::kBF16) return load_bf16(static_cast<const uint16_t*>(p) + index);
  else return load_f16(static_cast<const uint16_t*>(p) + index);
}

// Dense weights times float activations; any number of columns.
template <Type TYPE, int M>
QSPEC_INLINE void dense_panel(const Matrix& w, const Input& in, int64_t row, int64_t panel, V* out) {
  const int64_t K = w.num_cols, base = panel * K * kPanel;
  const float* x = in.x + row * in.x_stride;
  constexpr int64_t size = TYPE == Type::kF32 ? 4 : 2;
  const char* ahead = static_cast<const char*>(w.dense) + base * size + kExactAhead;
  V acc[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  int64_t k = 0;
  for (; k + 2 <= K; k += 2, ahead += 2 * kPanel * size) {
    prefetch(ahead);
    if constexpr (TYPE == Type::kF32) prefetch(ahead + 64);
    const V even = load_dense<TYPE>(w.dense, base + k * kPanel);
    const V odd = load_dense<TYPE>(w.dense, base + (k + 1) * kPanel);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      acc[m][0] = fma(set1(x[m * in.x_stride + k]), even, acc[m][0]);
      acc[m][1] = fma(set1(x[m * in.x_stride + k + 1]), odd, acc[m][1]);
    }
  }
  if (k < K) {
    const V even = load_dense<TYPE>(w.dense, base + k * kPanel);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][0] = fma(set1(x[m * in.x_stride + k]), even, acc[m][0]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m] = add(acc[m][0], acc[m][1]);
}

// What a linear computes with: the kernel's compile-time choices, made once a call.
enum class Path { kSigned4, kSigned8, kAffine4, kAffine8, kExact, kDense32, kDenseB16, kDenseF16 };

Path path_of(const Matrix& w, View view) {
  if (w.grid == Grid::kDense) {
    return w.type == Type::kF32 ? Path::kDense32
                                : w.type == Type::kBF16 ? Path::kDenseB16 : Path::kDenseF16;
  }
  const int bits = view.is_draft ? w.draft_bits : w.bits;
  if (bits == 16) return Path::kExact;
  if (w.grid == Grid::kSigned) return bits == 8 ? Path::kSigned8 : Path::kSigned4;
  return bits == 8 ? Path::kAffine8 : Path::kAffine4;
}

template <Path PATH, int LIMBS, int M>
void panel_block(const Matrix& w, const Input& in, int64_t row, int64_t panel, V* acc) {
  constexpr bool is_signed = PATH == Path::kSigned4 || PATH == Path::kSigned8;
  constexpr bool is_eight = PATH == Path::kSigned8 || PATH == Path::kAffine8;
  if constexpr (PATH == Path::kExact) exact_panel<M>(w, in, row, panel, acc);
  else if constexpr (PATH == Path::kDense32) dense_panel<Type::kF32, M>(w, in, row, panel, acc);
  else if constexpr (PATH == Path::kDenseB16) dense_panel<Type::kBF16, M>(w, in, row, panel, acc);
  else if constexpr (PATH == Path::kDenseF16) dense_panel<Type::kF16, M>(w, in, row, panel, acc);
  else {
    const Limbs& all = LIMBS == 1 ? in.one : LIMBS == 2 ? in.two : in.three;
    const int64_t meta = row * (in.num_cols / 32);
    const Limbs x{all.bytes + row * in.num_cols * LIMBS, all.scale + meta, all.total + meta,
                  all.group};
    if (w.group >= 64 && all.group >= 64) {
      integer_panel<is_signed, is_eight, LIMBS, M, 64>(w, x, panel, acc);
    } else {
      integer_panel<is_signed, is_eight, LIMBS, M, 32>(w, x, panel, acc);
    }
  }
}

using Block = void (*)(const Matrix&, const Input&, int64_t row, int64_t panel, V* acc);

template <Path PATH, int LIMBS, int M>
Block block_of(int num_rows) {
  if constexpr (M == 1) return panel_block<PATH, LIMBS, 1>;
  else return num_rows == M ? panel_block<PATH, LIMBS, M> : block_of<PATH, LIMBS, M - 1>(num_rows);
}

template <Path PATH>
Block integer_block(int limbs, int num_rows) {
  return limbs == 1   ? block_of<PATH, 1, kMaxRows[1]>(num_rows)
         : limbs == 2 ? block_of<PATH, 2, kMaxRows[2]>(num_rows)
                      : block_of<PATH, 3, kMaxRows[3]>(num_rows);
}

Block find_block(Path path, int limbs, int num_rows) {
  switch (path) {
    case Path::kSigned4: return integer_block<Path::kSigned4>(limbs, num_rows);
    case Path::kSigned8: return integer_block<Path::kSigned8>(limbs, num_rows);
    case Path::kAffine4: return integer_block<Path::kAffine4>(limbs, num_rows);
    case Path::kAffine8: return integer_block<Path::kAffine8>(limbs, num_rows);
    case Path::kExact: return block_of<Path::kExact, 0, kMaxRows[0]>(num_rows);
    case Path::kDense32: return block_of<Path::kDense32, 0, kMaxRows[0]>(num_rows);
    case Path::kDenseB16: return block_of<Path::kDenseB16, 0, kMaxRows[0]>(num_rows);
    default: return block_of<Path::kDenseF16, 0, kMaxRows[0]>(num_rows);
  }
}

void linear(const Matrix& w, const Input& in, View view, Form form, int64_t first, int64_t last,
            float* out, int64_t ld, const float* bias, bool round) {
  const Path path = path_of(w, view);
  const int limbs = form == kOne ? 1 : form == kTwo ? 2 : form == kThree ? 3 : 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kPanel, left = w.num_rows - column;
    const int lanes = left < kPanel ? static_cast<int>(left) : kPanel;
    const V b = bias ? load_n(bias + column, lanes) : zero();
    for (int64_t row = 0; row < in.num_rows;) {
      const int num_rows = static_cast<int>(row_block(in.num_rows, kMaxRows[limbs], row).count);
      V acc[8];
      find_block(path, limbs, num_rows)(w, in, row, panel, acc);
      for (int m = 0; m < num_rows; ++m) {
        const V sum = add(acc[m], b);
        store_n(out + (row + m) * ld + column, round ? round_bf16(sum) : sum, lanes);
      }
      row += num_rows;
    }
  }
}
