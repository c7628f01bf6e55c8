#include "stages.h"

namespace qspec {
namespace {

constexpr int64_t kSplitRows = 16;  // up to this many rows, threads share out the keys
constexpr int64_t kTileRows = 8;    // above, tiles of rows of one head

constexpr int64_t kMostShared = 128;  // columns that share a scale

// View.columns_a_scale of integers; 64 of a16 activations, or 32 where that does not divide them.
int32_t group_of(Form form, int64_t num_cols, const View& view) {
  if (form == kOne && view.activation == Activation::kA4) return 32;
  if (form == kOne && num_cols % view.group == 0) return static_cast<int32_t>(view.group);
  return num_cols % 64 ? 32 : 64;
}

int num_limbs(Form form) { return form == kOne ? 1 : form == kTwo ? 2 : 3; }

}  // namespace

Form form_of(const Matrix& w, View view, bool is_float) {
  const bool is_exact = w.bits == 16 && !view.is_draft;
  if (w.grid == Grid::kDense) return kFloat;
  if (is_exact) return kWide;
  if (view.is_draft && view.activation != Activation::kA16) return kOne;
  return is_float ? kThree : kTwo;
}

uint32_t forms_of(const Linear& linear, View view, bool is_float) {
  uint32_t forms = 0;
  for (const Part& part : linear) forms |= form_of(*part.weight, view, is_float);
  return forms;
}

int64_t num_columns(const Linear& linear) {
  int64_t total = 0;
  for (const Part& part : linear) total += part.weight->num_rows;
  return total;
}

void InputStore::reserve(Limbs& limbs, int num, int64_t num_rows, int64_t num_cols,
                         std::vector<int8_t>& bytes, std::vector<float>& scales) {
  const int64_t size = num_rows * num_cols, groups = num_rows * (num_cols / 32);
  if (static_cast<int64_t>(bytes.size()) < size * num) bytes.resize(size * num);
  if (static_cast<int64_t>(scales.size()) < 2 * groups) scales.resize(2 * groups);
  limbs.bytes = bytes.data();
  limbs.scale = scales.data();
  limbs.total = scales.data() + groups;
}

Input& InputStore::reserve(const float* x, int64_t stride, int64_t num_rows, int64_t num_cols,
                           uint32_t forms, View view) {
  input_.x = x;
  input_.x_stride = stride;
  input_.num_rows = num_rows;
  input_.num_cols = num_cols;
  input_.outliers = view.outliers;
  Limbs* limbs[3] = {&input_.one, &input_.two, &input_.three};
  const Form kinds[3] = {kOne, kTwo, kThree};
  if (forms & kWide) {
    if (static_cast<int64_t>(wide_.size()) < num_rows * num_cols) wide_.resize(num_rows * num_cols);
    input_.wide = wide_.data();
  }
  for (int i = 0; i < 3; ++i) {
    if (!(forms & kinds[i])) continue;
    reserve(*limbs[i], num_limbs(kinds[i]), num_rows, num_cols, bytes_[i], scales_[i]);
    limbs[i]->group = group_of(kinds[i], num_cols, view);
  }
  return input_;
}

void fill_forms(const Kernels& kernels, Input& input, uint32_t forms, Activation activation,
                int thread, int num_threads) {
  // shares of whole groups
  const int64_t groups = (input.num_cols + kMostShared - 1) / kMostShared;
  const int64_t first = groups * thread / num_threads * kMostShared;
  int64_t last = groups * (thread + 1) / num_threads * kMostShared;
  if (last > input.num_cols) last = input.num_cols;
  for (const Form form : {kOne, kTwo, kThree, kWide}) {
    if (forms & form) kernels.fill(input, form, activation, first, last);
  }
}

void Attention::plan(const std::vector<Span>& spans, const int64_t* positions, int64_t num_rows,
                     int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int num_threads) {
  positions_ = positions;
  num_rows_ = num_rows;
  num_heads_ = num_heads;
  group_ = num_heads / num_kv_heads;
  head_dim_ = head_dim;
  is_split_ = num_rows <= kSplitRows;
  items_.clear();
  int64_t most_parts = 0;
  for (const Span& span : spans) {
    const int64_t step = is_split_ ? span.last - span.first : kTileRows;
    for (int64_t row = span.first; row < span.last; row += step) {
      const int64_t stop = row + step < span.last ? row + step : span.last;
      int64_t last_position = 0;
      for (int64_t i = row; i < stop; ++i) {
        last_position = positions[i] > last_position ? positions[i] : last_position;
      }
      const int64_t parts = last_position / kKeys + 1;
      most_parts = parts > most_parts ? parts : most_parts;
      for (int64_t head = 0; head < num_kv_heads; ++head) {
        if (!is_split_) items_.push_back({row, stop, span.block_table, head, 0, parts});
        else
          for (int64_t part = 0; part < parts; ++part) {
            items_.push_back({row, stop, span.block_table, head, part, 1});
          }
      }
    }
  }
  const int64_t count =
      is_split_ ? most_parts * num_rows * num_heads : 2 * num_threads * kTileRows * group_;
  partials_.resize(count);
  values_.resize(count * head_dim);
  for (int64_t i = 0; i < count; ++i) partials_[i] = {0, 0, values_.data() + i * head_dim};
}

// One part of the keys for all rows of an item; partials are laid out [rows, heads of the group].
void Attention::attend_item(const Kernels& kernels, const Cache& cache, const Item& item,
                            const float* query, int64_t stride, int64_t part, Partial* to) {
  const Keys keys{&cache, item.block_table};
  const float* queries[kMaxPairs];
  int64_t positions[kMaxPairs];
  Partial* partials[kMaxPairs];
  int count = 0;
  for (int64_t row = item.first; row < item.last; ++row) {
    for (int64_t i = 0; i < group_; ++i) {
      const int64_t head = item.kv_head * group_ + i;
      queries[count] = query + row * stride + head * head_dim_;
      positions[count] = positions_[row];
      partials[count] = is_split_ ? to + row * num_heads_ + head : to + (row - item.first) * group_ + i;
      const bool is_last = row + 1 == item.last && i + 1 == group_;
      if (++count == kMaxPairs || is_last) {
        kernels.attend(keys, item.kv_head, part, count, queries, positions, partials);
        count = 0;
      }
    }
  }
}

void Attention::prompt_item(const Kernels& kernels, const Cache& cache, const Item& item,
                            const float* query, int64_t stride, float* out, bool round, int thread) {
  Partial* total = partials_.data() + 2 * thread * kTileRows * group_;
  Partial* next = total + kTileRows * group_;
  for (int64_t part = 0; part < item.num_parts; ++part) {
    attend_item(kernels, cache, item, query, stride, part, part ? next : total);
    if (!part) continue;
    for (int64_t row = item.first; row < item.last; ++row) {
      if (positions_[row] < part * kKeys) continue;
      const int64_t at = (row - item.first) * group_;
      for (int64_t i = 0; i < group_; ++i) kernels.merge(total[at + i], next[at + i], head_dim_);
    }
  }
  for (int64_t row = item.first; row < item.last; ++row) {
    for (int64_t i = 0; i < group_; ++i) {
      const int64_t head = item.kv_head * group_ + i;
      kernels.finish(total[(row - item.first) * group_ + i], head_dim_,
                     out + (row * num_heads_ + head) * head_dim_, round);
    }
  }
}

void Attention::run(const Kernels& kernels, const Cache& cache, const float* query, int64_t stride,
                    float* out, bool round, Pool& pool, int thread, Shares& attend, Shares& merge) {
  const auto num_items = static_cast<int64_t>(items_.size());
  attend.each(thread, num_items, 1, [&](int64_t i, int64_t) {
    const Item& item = items_[i];
    if (is_split_) {
      attend_item(kernels, cache, item, query, stride, item.first_part, partials(item.first_part));
    } else {
      prompt_item(kernels, cache, item, query, stride, out, round, thread);
    }
  });
  if (!is_split_) return;
  pool.barrier();
  merge.each(thread, num_rows_ * num_heads_, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Partial& total = partials(0)[i];
      const int64_t last_part = positions_[i / num_heads_] / kKeys;
      for (int64_t part = 1; part <= last_part; ++part) {
        kernels.merge(total, partials(part)[i], head_dim_);
      }
      kernels.finish(total, head_dim_, out + i * head_dim_, round);
    }
  });
}

}  // namespace qspec
