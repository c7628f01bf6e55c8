// Parts of a forward pass that all threads of the pool take together. Each is called by every
// thread inside a job; none waits for the others unless it says so.
#pragma once
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace qspec {

// A matrix of a linear and its bias [num_rows] or null.
struct Part {
  const Matrix* weight;
  const float* bias;
};
using Linear = std::vector<Part>;

uint32_t forms_of(const Linear& linear, View view, bool is_float);
int64_t num_columns(const Linear& linear);

// An Input with its own memory, which grows as needed.
class InputStore {
 public:
  // Room for the forms of rows x [rows, stride] that `view` reads.
  Input& reserve(const float* x, int64_t stride, int64_t num_rows, int64_t num_cols, uint32_t forms,
                 View view);
  Input& input() { return input_; }

 private:
  static void reserve(Limbs& limbs, int num_limbs, int64_t num_rows, int64_t num_cols,
                      std::vector<int8_t>& bytes, std::vector<float>& scales);
  Input input_{};
  std::vector<int8_t> bytes_[3];
  std::vector<float> scales_[3], wide_;
};

// Fill forms of an input; `thread` takes its share of the columns.
void fill_forms(const Kernels& kernels, Input& input, uint32_t forms, Activation activation,
                int thread, int num_threads);

// out [rows, ld] = x W^T + bias over all parts, side by side. `after(first, last)` is called for
// each range of columns as soon as it is there.
template <class After>
void linear_stage(const Kernels& kernels, const Linear& linear, const Input& input, View view,
                  bool is_float, int thread, int num_threads, Shares& shares, float* out, int64_t ld, bool round,
                  After&& after) {
  int64_t total = 0;
  for (const Part& part : linear) total += part.weight->num_panels;
  int64_t piece = total / (num_threads * 8);
  piece = piece < 1 ? 1 : piece > 16 ? 16 : piece;
  shares.each(thread, total, piece, [&](int64_t first, int64_t last) {
    int64_t panel = 0, column = 0;  // where the part begins
    for (const Part& part : linear) {
      const Matrix& w = *part.weight;
      const int64_t from = first > panel ? first - panel : 0;
      const int64_t to = last - panel < w.num_panels ? last - panel : w.num_panels;
      if (from < to) {
        kernels.linear(w, input, view, form_of(w, view, is_float), from, to, out + column, ld,
                       part.bias, round);
        const int64_t stop = to * kPanel < w.num_rows ? to * kPanel : w.num_rows;
        after(column + from * kPanel, column + stop);
      }
      panel += w.num_panels;
      column += w.num_rows;
    }
  });
}

// Rows of one sequence in a forward pass.
struct Span {
  int64_t first, last;
  const int64_t* block_table;
};

// Attention over a paged cache. Keys are reduced in parts of kKeys that merge in order, whichever
// thread computes them.
class Attention {
 public:
  // Split the work; positions [rows] must stay valid.
  void plan(const std::vector<Span>& spans, const int64_t* positions, int64_t num_rows,
            int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int num_threads);

  // out [rows, heads * D] from queries [rows, stride]. Waits for the other threads inside.
  void run(const Kernels& kernels, const Cache& cache, const float* query, int64_t stride, float* out,
           bool round, Pool& pool, int thread, Shares& attend, Shares& merge);

 private:
  struct Item {
    int64_t first, last;  // rows
    const int64_t* block_table;
    int64_t kv_head, first_part, num_parts;
  };
  void attend_item(const Kernels& kernels, const Cache& cache, const Item& item, const float* query,
                   int64_t stride, int64_t part, Partial* partials);
  void prompt_item(const Kernels& kernels, const Cache& cache, const Item& item, const float* query,
                   int64_t stride, float* out, bool round, int thread);
  Partial* partials(int64_t part) { return partials_.data() + part * num_rows_ * num_heads_; }

  std::vector<Item> items_;
  std::vector<Partial> partials_;  // [parts, rows, heads], or [threads, 2, rows of a tile, heads]
  std::vector<float> values_;
  const int64_t* positions_ = nullptr;
  int64_t num_rows_ = 0, num_heads_ = 0, group_ = 0, head_dim_ = 0;
  bool is_split_ = false;  // over keys, for few rows
};

}  // namespace qspec
