// What one ISA offers: a table of functions on raw pointers, each doing a part of an operation that
// one thread may take. Values between operations are float, rounded to bf16 where `round` says so.
#pragma once
#include "types.h"

namespace qspec {

constexpr int kKeys = 128;      // keys whose attention is reduced together; parts merge in order
constexpr int kMaxPairs = 32;   // (row, head) pairs that share a pass over those keys

// Where the rows of one sequence find their keys.
struct Keys {
  const Cache* cache;
  const int64_t* block_table;
};

// Attention of one head over some keys, before division: maximum, sum of weights, then values [D].
struct Partial {
  float max, sum;
  float* values;
};

struct Kernels {
  const char* name;

  // Fill columns [first, last) of one form of `input`, whole groups of them, from `x`. Rows lie
  // side by side in it, so threads that shared out the rows would write to the same cache lines.
  void (*fill)(Input& input, Form form, Activation activation, int64_t first, int64_t last);

  // out [rows, ld] = x W^T + bias, for the columns of panels [first, last).
  void (*linear)(const Matrix& weight, const Input& input, View view, Form form, int64_t first,
                 int64_t last, float* out, int64_t ld, const float* bias, bool round);

  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* out,
                   bool round);
  // x [heads, D] in place; cos and sin [D/2].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_dim,
               bool round);
  void (*silu_mul)(const float* gate, const float* up, float* out, int64_t size, bool round);
  void (*add)(float* x, const float* y, int64_t size, bool round);
  // x [size] in place times H (x) I, H of `order` rows (weights/hadamard.py, transform).
  void (*hadamard)(float* x, int64_t size, int64_t order, bool round);

  // One KV head's keys [part * kKeys, ...) against up to kMaxPairs queries [D], each of which sees
  // the keys up to its position. Pairs that see none of them are left alone.
  void (*attend)(const Keys& keys, int64_t kv_head, int64_t part, int num_pairs,
                 const float* const* queries, const int64_t* positions, Partial* const* partials);
  // Merge `next` into `total`, both over head_dim values.
  void (*merge)(Partial& total, const Partial& next, int64_t head_dim);
  // out = values / sum
  void (*finish)(const Partial& total, int64_t head_dim, float* out, bool round);

  void (*widen)(const void* x, Type type, int64_t size, float* out);
  void (*narrow)(const float* x, Type type, int64_t size, void* out);

  // Read memory and do next to nothing with it: what the machine delivers. Size in bytes, rounded
  // down to 256.
  int32_t (*read)(const void* memory, int64_t size);
};

extern const Kernels kGeneric;
#ifdef QSPEC_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The forms of its input that a matrix reads in a view.
Form form_of(const Matrix& weight, View view, bool is_float);

// One row of an embedding at full precision; exact, and the same on every ISA.
void embed_row(const Matrix& table, int64_t row, float* out);

}  // namespace qspec
