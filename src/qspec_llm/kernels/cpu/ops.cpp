#include "ops.h"

#include <memory>
#include <mutex>

#include "isa.h"
#include "stages.h"

namespace qspec {
namespace {

int64_t bytes_of(Type type) { return type == Type::kF32 ? 4 : 2; }
const char* at(const void* base, Type type, int64_t index) {
  return static_cast<const char*>(base) + index * bytes_of(type);
}
char* at(void* base, Type type, int64_t index) {
  return static_cast<char*>(base) + index * bytes_of(type);
}

// Call work(first, last) with each thread's share of the rows.
template <class Work>
void by_rows(int64_t num_rows, Work&& work) {
  Pool& team = pool();
  const int num_threads = num_rows > 1 ? team.size() : 1;
  if (num_threads == 1) return work(0, num_rows);
  team.run([&](int thread) {
    work(num_rows * thread / num_threads, num_rows * (thread + 1) / num_threads);
  });
}

// What op_linear and op_attention keep between calls; one call at a time uses it.
struct Scratch {
  std::mutex mutex;
  std::vector<float> in, out;
  InputStore store;
  Attention attention;
};
Scratch& scratch() {
  static Scratch the_scratch;
  return the_scratch;
}
void grow(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

}  // namespace

void check_rows(const RowTable& rows, int64_t num_slots, int64_t block_size) {
  const int64_t num_blocks = num_slots / block_size;
  if (rows.cu_rows[0] != 0 || rows.cu_rows[rows.num_spans] != rows.num_rows) {
    throw Error("cu_rows does not run from 0 to the number of rows, " +
                std::to_string(rows.num_rows));
  }
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    if (rows.slots[i] < 0 || rows.slots[i] >= num_slots) {
      throw Error("slot " + std::to_string(rows.slots[i]) + " lies outside of a cache of " +
                  std::to_string(num_slots) + " slots");
    }
  }
  for (int64_t span = 0; span < rows.num_spans; ++span) {
    if (rows.cu_rows[span] > rows.cu_rows[span + 1]) throw Error("cu_rows decreases");
    int64_t last = -1;
    for (int64_t i = rows.cu_rows[span]; i < rows.cu_rows[span + 1]; ++i) {
      if (rows.positions[i] < 0 || rows.positions[i] >= rows.table_width * block_size) {
        throw Error("position " + std::to_string(rows.positions[i]) +
                    " lies outside of a block table of " + std::to_string(rows.table_width) +
                    " blocks");
      }
      last = rows.positions[i] > last ? rows.positions[i] : last;
    }
    for (int64_t i = 0; last >= 0 && i <= last / block_size; ++i) {
      const int64_t block = rows.block_tables[span * rows.table_width + i];
      if (block < 0 || block >= num_blocks) {
        throw Error("block " + std::to_string(block) + " lies outside of a cache of " +
                    std::to_string(num_blocks) + " blocks");
      }
    }
  }
}

void op_embed(const Matrix& table, const int64_t* tokens, int64_t num_rows, void* out, Type type) {
  for (int64_t row = 0; row < num_rows; ++row) {
    if (tokens[row] < 0 || tokens[row] >= table.num_rows) {
      throw Error("token " + std::to_string(tokens[row]) + " is not in a vocabulary of " +
                  std::to_string(table.num_rows));
    }
  }
  by_rows(num_rows, [&](int64_t first, int64_t last) {
    std::vector<float> values(table.num_cols);
    for (int64_t row = first; row < last; ++row) {
      embed_row(table, tokens[row], values.data());
      kernels().narrow(values.data(), type, table.num_cols, at(out, type, row * table.num_cols));
    }
  });
}

void op_linear(const Matrix& w, View view, const void* x, Type x_type, int64_t num_rows,
               const float* bias, void* out, Type out_type) {
  Scratch& s = scratch();
  std::lock_guard<std::mutex> lock(s.mutex);
  const Kernels& k = kernels();
  const bool is_float = x_type == Type::kF32;
  const int64_t K = w.num_cols, N = w.num_rows;
  const Form form = form_of(w, view, is_float);
  grow(s.in, num_rows * K);
  grow(s.out, num_rows * N);
  Input& input = s.store.reserve(s.in.data(), K, num_rows, K, form, view);
  const Linear linear = {{&w, bias}};
  Pool& team = pool();
  Shares shares;
  shares.reset(team.size());
  team.run([&](int thread) {
    const int64_t first = num_rows * thread / team.size();
    const int64_t last = num_rows * (thread + 1) / team.size();
    k.widen(at(x, x_type, first * K), x_type, (last - first) * K, s.in.data() + first * K);
    team.barrier();
    fill_forms(k, input, form, view.activation, thread, team.size());
    team.barrier();
    linear_stage(k, linear, input, view, is_float, thread, team.size(), shares, s.out.data(), N, false,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = 0; row < num_rows; ++row) {
                     const int64_t index = row * N + begin;
                     k.narrow(s.out.data() + index, out_type, end - begin, at(out, out_type, index));
                   }
                 });
  });
}

void op_rms_norm(const void* x, Type type, int64_t num_rows, int64_t stride, int64_t heads,
                 int64_t size, const float* weight, float eps, void* out) {
  by_rows(num_rows, [&](int64_t first, int64_t last) {
    std::vector<float> row(heads * size);
    for (int64_t i = first; i < last; ++i) {
      kernels().widen(at(x, type, i * stride), type, heads * size, row.data());
      for (int64_t head = 0; head < heads; ++head) {
        float* values = row.data() + head * size;
        kernels().rms_norm(values, weight, eps, size, values, false);
      }
      kernels().narrow(row.data(), type, heads * size, at(out, type, i * heads * size));
    }
  });
}

void op_rope(const void* x, Type type, int64_t num_rows, int64_t stride, int64_t heads, int64_t size,
             const float* cos, const float* sin, void* out) {
  by_rows(num_rows, [&](int64_t first, int64_t last) {
    std::vector<float> row(heads * size);
    for (int64_t i = first; i < last; ++i) {
      kernels().widen(at(x, type, i * stride), type, heads * size, row.data());
      kernels().rope(row.data(), cos + i * (size / 2), sin + i * (size / 2), heads, size, false);
      kernels().narrow(row.data(), type, heads * size, at(out, type, i * heads * size));
    }
  });
}

void op_write_kv(const void* keys, int64_t key_stride, const void* values, int64_t value_stride,
                 Type type, const Pools& pools, const RowTable& rows) {
  const int64_t size = pools.num_kv_heads * pools.head_dim;
  std::vector<float> row(size);
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const int64_t slot = rows.slots[i];
    if (slot < 0 || slot >= pools.num_slots) {
      throw Error("slot " + std::to_string(slot) + " lies outside of a cache of " +
                  std::to_string(pools.num_slots) + " slots");
    }
    kernels().widen(at(keys, type, i * key_stride), type, size, row.data());
    kernels().narrow(row.data(), pools.type, size, at(pools.keys, pools.type, slot * size));
    kernels().widen(at(values, type, i * value_stride), type, size, row.data());
    kernels().narrow(row.data(), pools.type, size, at(pools.values, pools.type, slot * size));
  }
}

void op_attention(const void* query, Type type, int64_t num_heads, const Pools& pools,
                  const RowTable& rows, void* out) {
  check_rows(rows, pools.num_slots, pools.block_size);
  Scratch& s = scratch();
  std::lock_guard<std::mutex> lock(s.mutex);
  const Kernels& k = kernels();
  const int64_t size = num_heads * pools.head_dim;
  grow(s.in, rows.num_rows * size);
  grow(s.out, rows.num_rows * size);
  const Cache cache{pools.keys, pools.values, pools.type, pools.num_kv_heads, pools.head_dim,
                    pools.block_size};
  std::vector<Span> spans;
  for (int64_t i = 0; i < rows.num_spans; ++i) {
    spans.push_back({rows.cu_rows[i], rows.cu_rows[i + 1], rows.block_tables + i * rows.table_width});
  }
  Pool& team = pool();
  s.attention.plan(spans, rows.positions, rows.num_rows, num_heads, pools.num_kv_heads,
                   pools.head_dim, team.size());
  Shares attend, merge;
  attend.reset(team.size());
  merge.reset(team.size());
  k.widen(query, type, rows.num_rows * size, s.in.data());
  team.run([&](int thread) {
    s.attention.run(k, cache, s.in.data(), size, s.out.data(), false, team, thread, attend, merge);
  });
  k.narrow(s.out.data(), type, rows.num_rows * size, out);
}

int32_t read_memory(const void* memory, int64_t size) {
  constexpr int64_t kPiece = 1 << 18;
  Pool& team = pool();
  Shares shares;
  shares.reset(team.size());
  std::atomic<int32_t> total{0};
  team.run([&](int thread) {
    shares.each(thread, (size + kPiece - 1) / kPiece, 1, [&](int64_t i, int64_t) {
      const int64_t left = size - i * kPiece;
      total += kernels().read(static_cast<const char*>(memory) + i * kPiece,
                              left < kPiece ? left : kPiece);
    });
  });
  return total.load();
}

void op_hadamard(const void* x, Type type, int64_t num_rows, int64_t size, int64_t order,
                 void* out) {
  by_rows(num_rows, [&](int64_t first, int64_t last) {
    std::vector<float> row(size);
    for (int64_t i = first; i < last; ++i) {
      kernels().widen(at(x, type, i * size), type, size, row.data());
      kernels().hadamard(row.data(), size, order, false);
      kernels().narrow(row.data(), type, size, at(out, type, i * size));
    }
  });
}

void op_silu_mul(const void* gate_up, Type type, int64_t num_rows, int64_t size, void* out) {
  by_rows(num_rows, [&](int64_t first, int64_t last) {
    std::vector<float> row(2 * size);
    for (int64_t i = first; i < last; ++i) {
      kernels().widen(at(gate_up, type, i * 2 * size), type, 2 * size, row.data());
      kernels().silu_mul(row.data(), row.data() + size, row.data(), size, false);
      kernels().narrow(row.data(), type, size, at(out, type, i * size));
    }
  });
}

}  // namespace qspec
