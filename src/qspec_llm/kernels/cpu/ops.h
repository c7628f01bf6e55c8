// Single operations on tensors given by address. Shapes and dtypes were checked by ops.py.
#pragma once
#include "kernels.h"

namespace qspec {

// K and V pools of one layer, writable.
struct Pools {
  void *keys, *values;
  Type type;
  int64_t num_slots, num_kv_heads, head_dim, block_size;
};

// Where rows sit; the arrays of kernels.Rows.
struct RowTable {
  const int64_t *positions, *slots, *cu_rows, *block_tables;
  int64_t num_rows, num_spans, table_width;
};

void op_embed(const Matrix& table, const int64_t* tokens, int64_t num_rows, void* out, Type type);
void op_linear(const Matrix& weight, View view, const void* x, Type x_type, int64_t num_rows,
               const float* bias, void* out, Type out_type);
// x [rows, heads, size], a row every `stride` values.
void op_rms_norm(const void* x, Type type, int64_t num_rows, int64_t stride, int64_t heads,
                 int64_t size, const float* weight, float eps, void* out);
void op_rope(const void* x, Type type, int64_t num_rows, int64_t stride, int64_t heads, int64_t size,
             const float* cos, const float* sin, void* out);
void op_write_kv(const void* keys, int64_t key_stride, const void* values, int64_t value_stride,
                 Type type, const Pools& pools, const RowTable& rows);
void op_attention(const void* query, Type type, int64_t num_heads, const Pools& pools,
                  const RowTable& rows, void* out);
void op_hadamard(const void* x, Type type, int64_t num_rows, int64_t size, int64_t order, void* out);
void op_silu_mul(const void* gate_up, Type type, int64_t num_rows, int64_t size, void* out);

// Read memory with all threads; returns something that depends on it.
int32_t read_memory(const void* memory, int64_t size);

// Throws Error where a row, a block or a position lies outside of the cache.
void check_rows(const RowTable& rows, int64_t num_slots, int64_t block_size);

}  // namespace qspec
