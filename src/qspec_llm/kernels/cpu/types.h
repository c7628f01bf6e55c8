// The records that the binding, the whole step and the kernels of every ISA share. Plain data: no
// ownership, no behaviour. Tensors live in Python; these hold their addresses.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace qspec {

// Rows of a matrix that are stored together: one lane each. The same on every ISA, so that a packed
// matrix can be run by any of them.
constexpr int kPanel = 16;

enum class Type : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum class Grid : int32_t { kSigned = 0, kAffine = 1, kDense = 2 };
enum class Activation : int32_t { kA16 = 0, kA8 = 1, kA4 = 2 };

// Something that the caller can mend; becomes QSpecError in Python.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One packed matrix [num_rows, num_cols]; packed.py has the arrangement of every plane.
struct Matrix {
  int64_t num_rows, num_cols, num_panels;
  Grid grid;
  int32_t bits, draft_bits, group;
  Type type;  // of scales and offsets, or of a dense matrix
  const uint8_t *q4, *r4, *r8;
  const uint16_t *scale, *offset;
  const void* dense;
};

struct View {
  bool is_draft;
  Activation activation;
  int64_t outliers;  // first columns of an a4 input that have 8 bits, whole groups of them
  int64_t group;     // columns of an a8 input that share a scale: 64 or 128
};

// Rows x in the forms that linears read; which of them are filled is a set of Form bits.
enum Form : uint32_t {
  kFloat = 1,  // x itself
  kOne = 2,    // a8 or a4: one signed byte a value
  kTwo = 4,    // 16 bits a value, as two signed bytes: bf16 activations
  kThree = 8,  // 23 bits, as three: float32 activations
  kWide = 16,  // x itself, rows interleaved in blocks like the integers
};

// Integers of one Form: x = (256^2 limb 0 + 256 limb 1 + limb 2) * scale for three limbs, most
// significant first. Rows lie in blocks of those that go through a kernel together, so that one
// pointer walks through all of them; a block of M rows holds
//   bytes [K/8][M][limbs][8], scale and total [K/32][M]
// where total is the sum of 32 columns, the smallest group of weights, times scale.
struct Limbs {
  int8_t* bytes;
  float *scale, *total;
  int32_t group;  // columns that share a scale: 32, 64 or 128
};

struct Input {
  int64_t num_rows, num_cols;
  const float* x;  // [rows, K]
  int64_t x_stride;
  int64_t outliers;  // of View
  Limbs one, two, three;
  float* wide;  // blocks of M rows that go through a kernel together: [K/8][M][8]
};

// K and V of one layer, [slots, KV heads, D].
struct Cache {
  const void *keys, *values;
  Type type;
  int64_t num_kv_heads, head_dim, block_size;
};

}  // namespace qspec
