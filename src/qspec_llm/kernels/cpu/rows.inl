// Operations on one row at a time: activation quantisation, norm, rotation, SwiGLU, conversions.

constexpr int64_t kReadAhead = 2048;

// Largest |x| of some columns; NaN if one of them is, as its pattern is above that of infinity.
QSPEC_INLINE float largest(const float* x, int64_t size) {
  I top = zero_i();
  const I magnitude = set1_i(0x7FFFFFFF);
  for (int64_t k = 0; k < size; k += 16) top = max_i(top, and_i(as_int(load(x + k)), magnitude));
  const int32_t bits = hmax_i(top);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// A power of two, at least the smallest normal one, from its exponent.
QSPEC_INLINE float power_of_two(int exponent) {
  const int32_t bits = (exponent < -126 ? 1 : exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
QSPEC_INLINE int exponent_of(float x) {  // of a normal number or zero
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return ((bits >> 23) & 255) - 127;
}

// Where one row lies in its block.
struct RowPlace {
  int8_t* bytes;
  float *scale, *total;
  int64_t block_rows;
};
QSPEC_INLINE RowPlace place_of(const Limbs& to, int limbs, int64_t num_rows, int64_t row, int64_t K) {
  const RowBlock block = row_block(num_rows, kMaxRows[limbs], row);
  const int64_t m = row - block.first, meta = block.first * (K / 32) + m;
  return {to.bytes + block.first * K * limbs + m * limbs * 8, to.scale + meta, to.total + meta,
          block.count};
}

// Sixteen columns of one limb, of which `to` is the place of the first eight.
QSPEC_INLINE void store_limb(int8_t* to, int64_t stride, I x) {
  int8_t bytes[16];
  store_bytes(bytes, x);
  __builtin_memcpy(to, bytes, 8);
  __builtin_memcpy(to + stride, bytes + 8, 8);
}

// One signed byte a value, scale = largest / top: kernels/reference.py, quantize_activations. The top
// is 127 in the first `wide` columns, whole groups of them, and 7 in the others.
void fill_one(const float* x, int64_t size, int64_t wide, int64_t group, RowPlace to) {
  const int64_t stride = to.block_rows * 8;
  for (int64_t k0 = 0; k0 < size; k0 += group) {
    const float top = k0 < wide ? 127.0f : 7.0f;
    const V limit = set1(top), lowest = set1(-top);
    const float scale = largest(x + k0, group) / top;
    const V divisor = set1(scale < 1.17549435e-38f ? 1.17549435e-38f : scale);
    for (int64_t k = k0; k < k0 + group; k += 32) {
      I sum = zero_i();
      for (int64_t i = k; i < k + 32; i += 16, to.bytes += 2 * stride) {
        const I q = to_int(min(max(round_even(div(load(x + i), divisor)), lowest), limit));
        store_limb(to.bytes, stride, q);
        sum = add_i(sum, q);
      }
      *to.scale = scale;
      *to.total = static_cast<float>(hsum_i(sum)) * scale;
      to.scale += to.block_rows;
      to.total += to.block_rows;
    }
  }
}

// Two or three signed bytes a value and one power of two a group. With 15 bits below the largest
// value's leading one, bf16 values down to 7 octaves below it are exact; what is lost of smaller
// ones is 2^-7 of what bf16 itself lost of the largest. Three bytes carry 22 bits, for float32.
template <int LIMBS>
void fill_split(const float* x, int64_t size, int64_t group, RowPlace to) {
  const int64_t stride = to.block_rows * LIMBS * 8;
  for (int64_t k0 = 0; k0 < size; k0 += group) {
    const float top = largest(x + k0, group);
    // 1.004: a bf16 significand of all ones would need one more bit in the highest byte
    const int exponent = exponent_of(top * 1.004f) - (LIMBS == 2 ? 14 : 21);
    const float scale = power_of_two(exponent);
    const V inverse = set1(exponent < -126 ? 8.50705917e37f : 1.0f / scale);
    // NaN and infinity have no integers: they reach the result through the scale
    const bool is_finite = top - top == 0;
    const float kept = is_finite ? scale : top * 0.0f;
    for (int64_t k = k0; k < k0 + group; k += 32) {
      V sum = zero();
      for (int64_t i = k; i < k + 32; i += 16, to.bytes += 2 * stride) {
        I rest = is_finite ? to_int(mul(load(x + i), inverse)) : zero_i();
        sum = add(sum, to_float(rest));
        for (int l = LIMBS - 1; l >= 0; --l) {
          const I low = l > 0 ? sar<24>(shl<24>(rest)) : rest;  // sign-extended lowest byte
          store_limb(to.bytes + l * 8, stride, low);
          rest = sar<8>(sub_i(rest, low));
        }
      }
      *to.scale = kept;
      *to.total = hsum(sum) * kept;
      to.scale += to.block_rows;
      to.total += to.block_rows;
    }
  }
}

// The columns as they are; one row is a block as it lies.
void fill_wide(const Input& in, int64_t first, int64_t last) {
  for (int64_t row = 0; row < in.num_rows; ++row) {
    const RowBlock block = row_block(in.num_rows, kMaxRows[0], row);
    const float* x = in.x + row * in.x_stride;
    float* to = in.wide + block.first * in.num_cols + (row - block.first) * 8;
    for (int64_t k = first; k < last; k += 8) {
      __builtin_memcpy(to + k * block.count, x + k, 32);
    }
  }
}

void fill(Input& in, Form form, Activation activation, int64_t first, int64_t last) {
  if (form == kWide) return fill_wide(in, first, last);
  const int limbs = form == kOne ? 1 : form == kTwo ? 2 : 3;
  const Limbs& to = form == kOne ? in.one : form == kTwo ? in.two : in.three;
  const int64_t size = last - first;
  const int64_t wide = activation == Activation::kA4 ? in.outliers - first : size;
  for (int64_t row = 0; row < in.num_rows; ++row) {
    const float* x = in.x + row * in.x_stride + first;
    RowPlace place = place_of(to, limbs, in.num_rows, row, in.num_cols);
    place.bytes += first * place.block_rows * limbs;
    place.scale += first / 32 * place.block_rows;
    place.total += first / 32 * place.block_rows;
    if (form == kOne) fill_one(x, size, wide, to.group, place);
    if (form == kTwo) fill_split<2>(x, size, to.group, place);
    if (form == kThree) fill_split<3>(x, size, to.group, place);
  }
}

// exp(x) to about 1 ulp; 0 below -87.3, largest finite power above 88.
QSPEC_INLINE V exp_lanes(V x) {
  x = min(max(x, set1(-87.3f)), set1(88.0f));
  const V n = round_even(mul(x, set1(1.44269504f)));
  V r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);  // Cephes expf
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return as_float(add_i(as_int(p), shl<23>(to_int(n))));
}

QSPEC_INLINE void put(float* out, V x, int n, bool round) {
  if (round) x = round_bf16(x);
  if (n == 16) store(out, x);
  else store_n(out, x, n);
}
QSPEC_INLINE int lanes_left(int64_t at, int64_t size) {
  return size - at < 16 ? static_cast<int>(size - at) : 16;
}
QSPEC_INLINE V get(const float* x, int n) { return n == 16 ? load(x) : load_n(x, n); }

void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out, bool round) {
  V squares = zero();
  for (int64_t i = 0; i < size; i += 16) {
    const V v = get(x + i, lanes_left(i, size));
    squares = fma(v, v, squares);
  }
  const V factor = set1(1.0f / sqrtf(hsum(squares) / static_cast<float>(size) + eps));
  for (int64_t i = 0; i < size; i += 16) {
    const int n = lanes_left(i, size);
    put(out + i, mul(mul(get(x + i, n), factor), get(weight + i, n)), n, round);
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim, bool round) {
  const int64_t half = head_dim / 2;
  for (float* head = x; head < x + heads * head_dim; head += head_dim) {
    for (int64_t i = 0; i < half; i += 16) {
      const int n = lanes_left(i, half);
      const V a = get(head + i, n), b = get(head + half + i, n);
      const V c = get(cos + i, n), s = get(sin + i, n);
      put(head + i, sub(mul(a, c), mul(b, s)), n, round);
      put(head + half + i, add(mul(b, c), mul(a, s)), n, round);
    }
  }
}

void silu_mul(const float* gate, const float* up, float* out, int64_t size, bool round) {
  for (int64_t i = 0; i < size; i += 16) {
    const int n = lanes_left(i, size);
    const V g = get(gate + i, n);
    const V weight = add(set1(1.0f), exp_lanes(sub(zero(), g)));
    put(out + i, mul(div(g, weight), get(up + i, n)), n, round);
  }
}

void add_rows(float* x, const float* y, int64_t size, bool round) {
  for (int64_t i = 0; i < size; i += 16) {
    const int n = lanes_left(i, size);
    put(x + i, add(get(x + i, n), get(y + i, n)), n, round);
  }
}

// Butterflies over columns size / order apart, then twice as far, and so on.
void hadamard(float* x, int64_t size, int64_t order, bool round) {
  for (int64_t distance = size / order; distance < size; distance *= 2) {
    for (float* from = x; from < x + size; from += 2 * distance) {
      for (int64_t i = 0; i < distance; i += 16) {
        const int n = lanes_left(i, distance);
        const V a = get(from + i, n), b = get(from + distance + i, n);
        put(from + i, add(a, b), n, false);
        put(from + distance + i, sub(a, b), n, false);
      }
    }
  }
  const V factor = set1(static_cast<float>(1.0 / sqrt(static_cast<double>(order))));
  for (int64_t i = 0; i < size; i += 16) {
    const int n = lanes_left(i, size);
    put(x + i, mul(get(x + i, n), factor), n, round);
  }
}

void widen(const void* x, Type type, int64_t size, float* out) {
  int64_t i = 0;
  if (type == Type::kF32) {
    __builtin_memcpy(out, x, static_cast<size_t>(size) * 4);
    return;
  }
  const auto* half = static_cast<const uint16_t*>(x);
  for (; i + 16 <= size; i += 16) store(out + i, load_scale(half + i, type));
  if (i < size) {
    uint16_t tail[16] = {};
    __builtin_memcpy(tail, half + i, static_cast<size_t>(size - i) * 2);
    store_n(out + i, load_scale(tail, type), static_cast<int>(size - i));
  }
}

// To float32 or bf16; nothing is computed in f16.
void narrow(const float* x, Type type, int64_t size, void* out) {
  if (type == Type::kF32) {
    __builtin_memcpy(out, x, static_cast<size_t>(size) * 4);
    return;
  }
  auto* half = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < size; i += 16) {
    const int n = lanes_left(i, size);
    const V rounded = round_bf16(get(x + i, n));
    uint16_t tail[16];
    store_bf16(n == 16 ? half + i : tail, rounded);
    if (n < 16) __builtin_memcpy(half + i, tail, static_cast<size_t>(n) * 2);
  }
}

int32_t read_memory(const void* memory, int64_t size) {
  const auto* p = static_cast<const char*>(memory);
  I sums[4] = {zero_i(), zero_i(), zero_i(), zero_i()};
  for (int64_t at = 0; at + 256 <= size; at += 256) {
    for (int i = 0; i < 4; ++i) {
      prefetch(p + at + 64 * i + kReadAhead);
      sums[i] = add_i(sums[i], load_i(p + at + 64 * i));
    }
  }
  return hsum_i(add_i(add_i(sums[0], sums[1]), add_i(sums[2], sums[3])));
}
