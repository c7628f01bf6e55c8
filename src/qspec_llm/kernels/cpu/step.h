// A whole forward pass in one call. It runs the same kernels in the same order and rounds where the
// operations of ops.h round, so its result equals theirs to the bit; what it saves is everything
// between them.
#pragma once
#include <memory>
#include <mutex>

#include "ops.h"
#include "stages.h"

namespace qspec {

struct Sizes {
  int64_t hidden, intermediate, num_heads, num_kv_heads, head_dim, vocabulary;
  float eps;
  bool is_float;     // activations are float32, not bf16
  int64_t hadamard;  // largest order of the rotation of the layers' inputs; 0: none
  int64_t outliers;  // first columns that a4 drafts see in 8 bits, but for kOutput; 0: none
};

// Weights of a layer. Norms are float32 vectors; q_norm and k_norm may be null.
struct Layer {
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  Linear qkv, output, gate_up, down;
};

class Step {
 public:
  Step(Sizes sizes, const Matrix* embedding, const float* final_norm, Linear head, const float* cos,
       const float* sin, int64_t num_positions);

  void add_layer(Layer layer);
  void set_cache(std::vector<Pools> pools);

  // Logits [num_logits, vocabulary] of some rows; K and V of all rows are written.
  // `head_activation` is what the head sees in a draft.
  void forward(const int64_t* tokens, const RowTable& rows, View view, Activation head_activation,
               const int64_t* logit_rows, int64_t num_logits, float* logits);

 private:
  enum Stage { kQkv, kOutput, kGateUp, kDown, kHead, kNumStages };

  void check(const int64_t* tokens, const RowTable& rows, const int64_t* logit_rows,
             int64_t num_logits) const;
  void run_rows(const int64_t* tokens, const RowTable& rows, int64_t first, int64_t last);
  void run_head(int64_t num_logits, float* logits);
  int64_t input_size(Stage stage) const;
  int64_t order(Stage stage) const;
  void reserve(int64_t num_rows);
  const Input& ready(int thread, Stage stage, uint32_t forms, const float* norm);
  void run_layer(int thread, size_t index);
  void embed(const int64_t* tokens, int64_t first, int64_t last);
  void place(const Layer& layer, const Pools& pools, int64_t row, int64_t kv_head);
  void add_output(int thread, const Linear& linear, const Input& input, Shares& loop);
  void gate_up(const Linear& linear, const Input& input, int thread, Shares& loop);

  const Sizes sizes_;
  const Matrix* embedding_;
  const float* final_norm_;
  const Linear head_;
  const float *cos_, *sin_;
  const int64_t num_positions_;
  std::vector<Layer> layers_;
  std::vector<Pools> pools_;

  // State of the call in progress; one at a time.
  std::mutex mutex_;
  const Kernels* kernels_ = nullptr;
  Pool* pool_ = nullptr;
  View view_{};
  int64_t num_rows_ = 0;
  const int64_t *positions_ = nullptr, *slots_ = nullptr;
  bool has_own_inputs_ = false;  // every thread prepares its own: few rows
  std::vector<float> x_, qkv_, attended_, sum_, gate_up_, activated_, wanted_;
  // one a thread: inputs after a norm, and those of kOutput and kDown after a rotation
  std::vector<std::vector<float>> normed_, turned_;
  std::vector<std::vector<InputStore>> inputs_;  // [threads][stages]
  std::vector<Shares> loops_;  // one for each parallel loop of a step
  Attention attention_;
};

}  // namespace qspec
