// Rows of an embedding at full precision, one weight at a time: few rows are looked up, and the
// definition (weights/planes.py) is followed to the bit on every ISA.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace qspec {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float from_bf16(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

float from_f16(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) value = mantissa ? NAN : INFINITY;
  return half & 0x8000 ? -value : value;
}
float load(uint16_t half, Type type) {
  return type == Type::kBF16 ? from_bf16(half) : from_f16(half);
}

// The nibble of column k; packed.py has the order.
int nibble(const uint8_t* plane, int64_t panel, int64_t K, int64_t lane, int64_t k) {
  const uint8_t byte = plane[panel * K * (kPanel / 2) + (k / 8 * kPanel + lane) * 4 + k % 4];
  return k % 8 < 4 ? byte & 15 : byte >> 4;
}

float exact(int code, float scale, int residual) {
  constexpr int kCentre = 3583;
  const uint32_t product = to_bits((static_cast<float>(code) - 7.5f) * scale);
  const uint32_t anchor = (product + 0x7FFF + ((product >> 16) & 1)) >> 16;
  if (residual == 0) return from_bits((anchor & 0x8000) << 16);
  return from_bits((anchor + static_cast<uint32_t>(residual - kCentre)) << 16);
}

}  // namespace

void embed_row(const Matrix& w, int64_t row, float* out) {
  const int64_t K = w.num_cols, panel = row / kPanel, lane = row % kPanel;
  if (w.grid == Grid::kDense) {
    const int64_t base = panel * K * kPanel + lane;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = base + k * kPanel;
      out[k] = w.type == Type::kF32 ? static_cast<const float*>(w.dense)[at]
                                    : load(static_cast<const uint16_t*>(w.dense)[at], w.type);
    }
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    const int64_t group = (panel * (K / w.group) + k / w.group) * kPanel + lane;
    const float scale = load(w.scale[group], w.type);
    const int code = nibble(w.q4, panel, K, lane, k);
    if (w.bits == 16) {
      const int high = 15 - nibble(w.r4, panel, K, lane, k);
      const int low = 255 - w.r8[panel * K * kPanel + (k / 4 * kPanel + lane) * 4 + k % 4];
      out[k] = exact(code, scale, high * 256 + low);
      continue;
    }
    int level = w.grid == Grid::kSigned ? code - (code >> 3) - 7 : code;
    if (w.bits == 8) level = 16 * level + nibble(w.r4, panel, K, lane, k);
    if (w.grid == Grid::kSigned) level -= 8;
    else if (!w.offset) level -= w.bits == 8 ? 128 : 8;
    out[k] = static_cast<float>(level) * (w.bits == 8 ? scale / 16 : scale);
    if (w.offset) out[k] += load(w.offset[group], w.type);
  }
}

}  // namespace qspec
