#include "step.h"

#include "isa.h"

namespace qspec {
namespace {

// Rows that go through the layers together. More would only need more memory: at this size linears
// are bound by computation.
constexpr int64_t kMostRows = 256;
// Up to this many rows every thread prepares the input of a linear for itself: cheaper than waiting
// for each other once more.
constexpr int64_t kOwnRows = 2;
constexpr int kLoopsPerLayer = 6;

void grow(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

}  // namespace

Step::Step(Sizes sizes, const Matrix* embedding, const float* final_norm, Linear head,
           const float* cos, const float* sin, int64_t num_positions)
    : sizes_(sizes),
      embedding_(embedding),
      final_norm_(final_norm),
      head_(std::move(head)),
      cos_(cos),
      sin_(sin),
      num_positions_(num_positions) {}

void Step::add_layer(Layer layer) {
  const int64_t width = (sizes_.num_heads + 2 * sizes_.num_kv_heads) * sizes_.head_dim;
  if (num_columns(layer.qkv) != width || num_columns(layer.output) != sizes_.hidden ||
      num_columns(layer.gate_up) != 2 * sizes_.intermediate ||
      num_columns(layer.down) != sizes_.hidden) {
    throw Error("a layer's matrices do not have the shapes that its configuration says");
  }
  layers_.push_back(std::move(layer));
}

void Step::set_cache(std::vector<Pools> pools) {
  if (pools.size() != layers_.size()) {
    throw Error("the KV cache has " + std::to_string(pools.size()) + " layers, the model " +
                std::to_string(layers_.size()));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  pools_ = std::move(pools);
}

void Step::check(const int64_t* tokens, const RowTable& rows, const int64_t* logit_rows,
                 int64_t num_logits) const {
  if (pools_.empty()) throw Error("the step has no KV cache yet");
  check_rows(rows, pools_[0].num_slots, pools_[0].block_size);
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    if (tokens[i] < 0 || tokens[i] >= embedding_->num_rows) {
      throw Error("token " + std::to_string(tokens[i]) + " is not in a vocabulary of " +
                  std::to_string(embedding_->num_rows));
    }
    if (rows.positions[i] >= num_positions_) {
      throw Error("position " + std::to_string(rows.positions[i]) + " is beyond the " +
                  std::to_string(num_positions_) + " positions this decoder was loaded for");
    }
  }
  for (int64_t i = 0; i < num_logits; ++i) {
    if (logit_rows[i] < 0 || logit_rows[i] >= rows.num_rows) {
      throw Error("logits of row " + std::to_string(logit_rows[i]) + " of " +
                  std::to_string(rows.num_rows) + " cannot be computed");
    }
  }
}

void Step::forward(const int64_t* tokens, const RowTable& rows, View view,
                   Activation head_activation, const int64_t* logit_rows, int64_t num_logits,
                   float* logits) {
  std::lock_guard<std::mutex> lock(mutex_);
  check(tokens, rows, logit_rows, num_logits);
  kernels_ = &kernels();
  pool_ = &pool();
  view_ = view;
  const int64_t hidden = sizes_.hidden;
  grow(wanted_, num_logits * hidden);
  for (int64_t first = 0; first < rows.num_rows; first += kMostRows) {
    const int64_t last = first + kMostRows < rows.num_rows ? first + kMostRows : rows.num_rows;
    run_rows(tokens, rows, first, last);
    for (int64_t i = 0; i < num_logits; ++i) {
      if (logit_rows[i] < first || logit_rows[i] >= last) continue;
      const float* from = x_.data() + (logit_rows[i] - first) * hidden;
      std::copy(from, from + hidden, wanted_.data() + i * hidden);
    }
  }
  view_.activation = head_activation;
  if (num_logits) run_head(num_logits, logits);
}

void Step::reserve(int64_t num_rows) {
  const Sizes& s = sizes_;
  const int64_t attended = s.num_heads * s.head_dim;
  num_rows_ = num_rows;
  has_own_inputs_ = num_rows <= kOwnRows;
  grow(x_, num_rows * s.hidden);
  grow(sum_, num_rows * s.hidden);
  grow(qkv_, num_rows * (attended + 2 * s.num_kv_heads * s.head_dim));
  grow(attended_, num_rows * attended);
  grow(gate_up_, num_rows * 2 * s.intermediate);
  grow(activated_, num_rows * s.intermediate);
  const int num_owners = has_own_inputs_ ? pool_->size() : 1;
  if (static_cast<int>(inputs_.size()) < num_owners) {
    inputs_.resize(num_owners);
    normed_.resize(num_owners);
    turned_.resize(num_owners);
  }
  uint32_t forms[kNumStages] = {};
  for (const Layer& layer : layers_) {
    forms[kQkv] |= forms_of(layer.qkv, view_, s.is_float);
    forms[kOutput] |= forms_of(layer.output, view_, s.is_float);
    forms[kGateUp] |= forms_of(layer.gate_up, view_, s.is_float);
    forms[kDown] |= forms_of(layer.down, view_, s.is_float);
  }
  forms[kHead] = forms_of(head_, view_, s.is_float);
  for (int owner = 0; owner < num_owners; ++owner) {
    grow(normed_[owner], num_rows * s.hidden);
    inputs_[owner].resize(kNumStages);
    const float* normed = normed_[owner].data();
    const float* x[kNumStages] = {normed, attended_.data(), normed, activated_.data(), normed};
    if (s.hadamard) {
      grow(turned_[owner], num_rows * (attended > s.intermediate ? attended : s.intermediate));
      x[kOutput] = x[kDown] = turned_[owner].data();
    }
    for (int stage = 0; stage < kNumStages; ++stage) {
      const int64_t size = input_size(static_cast<Stage>(stage));
      View view = view_;
      view.outliers = stage == kOutput || stage == kHead ? 0 : s.outliers;
      inputs_[owner][stage].reserve(x[stage], size, num_rows, size, forms[stage], view);
    }
  }
  const size_t num_loops = layers_.size() * kLoopsPerLayer + 1;
  if (loops_.empty()) loops_ = std::vector<Shares>(num_loops);
  for (Shares& loop : loops_) loop.reset(pool_->size());
}

void Step::run_rows(const int64_t* tokens, const RowTable& rows, int64_t first, int64_t last) {
  reserve(last - first);
  positions_ = rows.positions + first;
  slots_ = rows.slots + first;
  std::vector<Span> spans;
  for (int64_t i = 0; i < rows.num_spans; ++i) {
    const int64_t begin = rows.cu_rows[i] > first ? rows.cu_rows[i] : first;
    const int64_t end = rows.cu_rows[i + 1] < last ? rows.cu_rows[i + 1] : last;
    if (begin < end) {
      spans.push_back({begin - first, end - first, rows.block_tables + i * rows.table_width});
    }
  }
  attention_.plan(spans, positions_, num_rows_, sizes_.num_heads, sizes_.num_kv_heads,
                  sizes_.head_dim, pool_->size());
  pool_->run([&](int thread) {
    const int num_threads = pool_->size();
    embed(tokens + first, num_rows_ * thread / num_threads, num_rows_ * (thread + 1) / num_threads);
    pool_->barrier();
    for (size_t index = 0; index < layers_.size(); ++index) run_layer(thread, index);
  });
}

void Step::embed(const int64_t* tokens, int64_t first, int64_t last) {
  const int64_t hidden = sizes_.hidden;
  std::vector<uint16_t> half(hidden);
  for (int64_t row = first; row < last; ++row) {
    float* x = x_.data() + row * hidden;
    embed_row(*embedding_, tokens[row], x);
    if (sizes_.is_float) continue;
    kernels_->narrow(x, Type::kBF16, hidden, half.data());
    kernels_->widen(half.data(), Type::kBF16, hidden, x);
  }
}

int64_t Step::input_size(Stage stage) const {
  if (stage == kOutput) return sizes_.num_heads * sizes_.head_dim;
  return stage == kDown ? sizes_.intermediate : sizes_.hidden;
}

// Of the rotation of a stage's input, the largest power of two that divides its size; 0 for none.
int64_t Step::order(Stage stage) const {
  if (!sizes_.hadamard || stage == kHead) return 0;
  int64_t order = sizes_.hadamard;
  while (input_size(stage) % order) order /= 2;
  return order;
}

// The input of a linear in the forms that its matrices read; `norm` is applied to x first where the
// stage has one, and then the rotation where the model has one. Waits for the others unless every
// thread prepares its own.
const Input& Step::ready(int thread, Stage stage, uint32_t forms, const float* norm) {
  const int owner = has_own_inputs_ ? thread : 0, num_threads = pool_->size();
  Input& input = inputs_[owner][stage].input();
  const int64_t first = has_own_inputs_ ? 0 : num_rows_ * thread / num_threads;
  const int64_t last = has_own_inputs_ ? num_rows_ : num_rows_ * (thread + 1) / num_threads;
  const int64_t size = input_size(stage), order = this->order(stage);
  const bool round = !sizes_.is_float;
  float* to = norm ? normed_[owner].data() : turned_[owner].data();
  const float* from = stage == kHead     ? wanted_.data()
                      : norm             ? x_.data()
                      : stage == kOutput ? attended_.data()
                                         : activated_.data();
  for (int64_t row = first; row < last && (norm || order); ++row) {
    float* values = to + row * size;
    if (norm) kernels_->rms_norm(from + row * size, norm, sizes_.eps, size, values, round);
    else std::copy(from + row * size, from + (row + 1) * size, values);
    if (order) kernels_->hadamard(values, size, order, round);
  }
  if (has_own_inputs_) {
    fill_forms(*kernels_, input, forms, view_.activation, 0, 1);
  } else {
    if (norm || order) pool_->barrier();
    fill_forms(*kernels_, input, forms, view_.activation, thread, num_threads);
    pool_->barrier();
  }
  return input;
}

void Step::run_layer(int thread, size_t index) {
  const Layer& layer = layers_[index];
  const Pools& pools = pools_[index];
  const bool is_float = sizes_.is_float;
  Shares* loop = loops_.data() + index * kLoopsPerLayer;
  const int64_t width = (sizes_.num_heads + 2 * sizes_.num_kv_heads) * sizes_.head_dim;

  const Input& input = ready(thread, kQkv, forms_of(layer.qkv, view_, is_float), layer.input_norm);
  linear_stage(*kernels_, layer.qkv, input, view_, is_float, thread, pool_->size(), loop[0],
               qkv_.data(), width, !is_float, [](int64_t, int64_t) {});
  pool_->barrier();

  const int64_t num_places = num_rows_ * sizes_.num_kv_heads, num_threads = pool_->size();
  for (int64_t i = num_places * thread / num_threads; i < num_places * (thread + 1) / num_threads;
       ++i) {
    place(layer, pools, i / sizes_.num_kv_heads, i % sizes_.num_kv_heads);
  }
  pool_->barrier();

  const Cache cache{pools.keys, pools.values, pools.type, pools.num_kv_heads, pools.head_dim,
                    pools.block_size};
  attention_.run(*kernels_, cache, qkv_.data(), width, attended_.data(), !is_float, *pool_, thread,
                 loop[1], loop[2]);
  pool_->barrier();

  add_output(thread, layer.output,
             ready(thread, kOutput, forms_of(layer.output, view_, is_float), nullptr), loop[3]);
  gate_up(layer.gate_up,
          ready(thread, kGateUp, forms_of(layer.gate_up, view_, is_float), layer.post_norm), thread,
          loop[4]);
  add_output(thread, layer.down,
             ready(thread, kDown, forms_of(layer.down, view_, is_float), nullptr), loop[5]);
}

// Rotate the query heads of one KV head and its key, and write K and V to the cache.
void Step::place(const Layer& layer, const Pools& pools, int64_t row, int64_t kv_head) {
  const Sizes& s = sizes_;
  const int64_t D = s.head_dim, group = s.num_heads / s.num_kv_heads;
  float* base = qkv_.data() + row * (s.num_heads + 2 * s.num_kv_heads) * D;
  float* query = base + kv_head * group * D;
  float* key = base + (s.num_heads + kv_head) * D;
  const float* value = key + s.num_kv_heads * D;
  const bool round = !s.is_float;
  if (layer.q_norm) {
    for (int64_t i = 0; i < group; ++i) {
      kernels_->rms_norm(query + i * D, layer.q_norm, s.eps, D, query + i * D, round);
    }
    kernels_->rms_norm(key, layer.k_norm, s.eps, D, key, round);
  }
  const float *cos = cos_ + positions_[row] * (D / 2), *sin = sin_ + positions_[row] * (D / 2);
  kernels_->rope(query, cos, sin, group, D, round);
  kernels_->rope(key, cos, sin, 1, D, round);
  const int64_t at = (slots_[row] * s.num_kv_heads + kv_head) * D * (pools.type == Type::kF32 ? 4 : 2);
  kernels_->narrow(key, pools.type, D, static_cast<char*>(pools.keys) + at);
  kernels_->narrow(value, pools.type, D, static_cast<char*>(pools.values) + at);
}

// x += linear(input), and wait for it.
void Step::add_output(int thread, const Linear& linear, const Input& input, Shares& loop) {
  const int64_t hidden = sizes_.hidden;
  const bool round = !sizes_.is_float;
  linear_stage(*kernels_, linear, input, view_, sizes_.is_float, thread, pool_->size(), loop,
               sum_.data(), hidden, round, [&](int64_t first, int64_t last) {
                 for (int64_t row = 0; row < num_rows_; ++row) {
                   const int64_t at = row * hidden + first;
                   kernels_->add(x_.data() + at, sum_.data() + at, last - first, round);
                 }
               });
  pool_->barrier();
}

// activated = silu(gate) * up, and wait for it. Where gate and up are cut into panels alike, whoever
// computes columns of one computes those of the other and goes on.
void Step::gate_up(const Linear& linear, const Input& input, int thread, Shares& loop) {
  const int64_t size = sizes_.intermediate, num_panels = size / kPanel;
  const bool round = !sizes_.is_float;
  const int num_threads = pool_->size();
  const auto activate = [&](int64_t row, int64_t first, int64_t last) {
    const float* gate = gate_up_.data() + row * 2 * size;
    kernels_->silu_mul(gate + first, gate + size + first, activated_.data() + row * size + first,
                       last - first, round);
  };
  const bool is_whole = linear.size() == 1;
  const bool is_paired = linear.size() == 2 && linear[0].weight->num_rows == size;
  if (size % kPanel == 0 && (is_whole || is_paired)) {
    const Part &gate = linear.front(), &up = linear.back();
    const int64_t shift = is_whole ? num_panels : 0, share = num_panels / (num_threads * 8);
    const int64_t piece = share < 1 ? 1 : share > 8 ? 8 : share;
    loop.each(thread, num_panels, piece, [&](int64_t first, int64_t last) {
      kernels_->linear(*gate.weight, input, view_, form_of(*gate.weight, view_, sizes_.is_float),
                       first, last, gate_up_.data(), 2 * size, gate.bias, round);
      kernels_->linear(*up.weight, input, view_, form_of(*up.weight, view_, sizes_.is_float),
                       first + shift, last + shift, gate_up_.data() + (is_whole ? 0 : size),
                       2 * size, up.bias, round);
      for (int64_t row = 0; row < num_rows_; ++row) activate(row, first * kPanel, last * kPanel);
    });
  } else {
    linear_stage(*kernels_, linear, input, view_, sizes_.is_float, thread, num_threads, loop,
                 gate_up_.data(), 2 * size, round, [](int64_t, int64_t) {});
    pool_->barrier();
    for (int64_t row = 0; row < num_rows_; ++row) {
      activate(row, size * thread / num_threads, size * (thread + 1) / num_threads);
    }
  }
  pool_->barrier();
}

void Step::run_head(int64_t num_logits, float* logits) {
  reserve(num_logits);
  const uint32_t forms = forms_of(head_, view_, sizes_.is_float);
  Shares& loop = loops_[layers_.size() * kLoopsPerLayer];
  pool_->run([&](int thread) {
    const Input& input = ready(thread, kHead, forms, final_norm_);
    linear_stage(*kernels_, head_, input, view_, sizes_.is_float, thread, pool_->size(), loop,
                 logits, sizes_.vocabulary, false, [](int64_t, int64_t) {});
  });
}

}  // namespace qspec
