// The binding: addresses and sizes in, nothing of torch. What arrives here was checked in Python
// (packed.py, ops.py, step.py); what depends on values is checked below and raises QSpecError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qspec {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (matrix, address of its bias or 0)
using PyParts = std::vector<std::pair<const Matrix*, Address>>;

Linear parts(const PyParts& from) {
  Linear linear;
  for (const auto& [weight, bias] : from) linear.push_back({weight, pointer<const float>(bias)});
  return linear;
}

Pools pools(Address keys, Address values, int type, int64_t num_slots, int64_t num_kv_heads,
            int64_t head_dim, int64_t block_size) {
  return {pointer<void>(keys), pointer<void>(values), static_cast<Type>(type), num_slots,
          num_kv_heads,        head_dim,              block_size};
}

View view(bool is_draft, int activation, int64_t outliers, int64_t group) {
  return {is_draft, static_cast<Activation>(activation), outliers, group};
}

void bind_matrix(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def(
          "__init__",
          [](Matrix* self, int64_t num_rows, int64_t num_cols, int grid, int bits, int draft_bits,
             int group, int type, Address q4, Address r4, Address r8, Address scale, Address offset,
             Address dense) {
            new (self) Matrix{num_rows,
                              num_cols,
                              (num_rows + kPanel - 1) / kPanel,
                              static_cast<Grid>(grid),
                              bits,
                              draft_bits,
                              group,
                              static_cast<Type>(type),
                              pointer<const uint8_t>(q4),
                              pointer<const uint8_t>(r4),
                              pointer<const uint8_t>(r8),
                              pointer<const uint16_t>(scale),
                              pointer<const uint16_t>(offset),
                              pointer<const void>(dense)};
          },
          nb::kw_only(), "num_rows"_a, "num_cols"_a, "grid"_a, "bits"_a, "draft_bits"_a, "group"_a,
          "type_code"_a, "q4"_a = 0, "r4"_a = 0, "r8"_a = 0, "scale"_a = 0, "offset"_a = 0,
          "dense"_a = 0);
}

void bind_pools(nb::module_& m) {
  nb::class_<Pools>(m, "Pools")
      .def(
          "__init__",
          [](Pools* self, Address keys, Address values, int type, int64_t num_slots,
             int64_t num_kv_heads, int64_t head_dim, int64_t block_size) {
            new (self)
                Pools(pools(keys, values, type, num_slots, num_kv_heads, head_dim, block_size));
          },
          "keys"_a, "values"_a, "type_code"_a, "num_slots"_a, "num_kv_heads"_a, "head_dim"_a,
          "block_size"_a);
}

void bind_rows(nb::module_& m) {
  nb::class_<RowTable>(m, "RowTable")
      .def(
          "__init__",
          [](RowTable* self, Address positions, Address slots, Address cu_rows, Address block_tables,
             int64_t num_rows, int64_t num_spans, int64_t table_width) {
            new (self) RowTable{pointer<const int64_t>(positions), pointer<const int64_t>(slots),
                                pointer<const int64_t>(cu_rows),
                                pointer<const int64_t>(block_tables),
                                num_rows,
                                num_spans,
                                table_width};
          },
          "positions"_a, "slots"_a, "cu_rows"_a, "block_tables"_a, "num_rows"_a, "num_spans"_a,
          "table_width"_a);
}

void bind_ops(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.def(
      "embed",
      [](const Matrix& table, Address tokens, int64_t num_rows, Address out, int type) {
        op_embed(table, pointer<const int64_t>(tokens), num_rows, pointer<void>(out),
                 static_cast<Type>(type));
      },
      release());
  m.def(
      "linear",
      [](const Matrix& weight, bool is_draft, int activation, int64_t outliers, int64_t group,
         Address x, int x_type, int64_t num_rows, Address bias, Address out, int out_type) {
        op_linear(weight, view(is_draft, activation, outliers, group), pointer<const void>(x),
                  static_cast<Type>(x_type), num_rows, pointer<const float>(bias),
                  pointer<void>(out), static_cast<Type>(out_type));
      },
      release());
  m.def(
      "rms_norm",
      [](Address x, int type, int64_t num_rows, int64_t stride, int64_t heads, int64_t size,
         Address weight, float eps, Address out) {
        op_rms_norm(pointer<const void>(x), static_cast<Type>(type), num_rows, stride, heads, size,
                    pointer<const float>(weight), eps, pointer<void>(out));
      },
      release());
  m.def(
      "rope",
      [](Address x, int type, int64_t num_rows, int64_t stride, int64_t heads, int64_t size,
         Address cos, Address sin, Address out) {
        op_rope(pointer<const void>(x), static_cast<Type>(type), num_rows, stride, heads, size,
                pointer<const float>(cos), pointer<const float>(sin), pointer<void>(out));
      },
      release());
  m.def(
      "write_kv",
      [](Address keys, int64_t key_stride, Address values, int64_t value_stride, int type,
         const Pools& to, const RowTable& rows) {
        op_write_kv(pointer<const void>(keys), key_stride, pointer<const void>(values), value_stride,
                    static_cast<Type>(type), to, rows);
      },
      release());
  m.def(
      "attention",
      [](Address query, int type, int64_t num_heads, const Pools& from, const RowTable& rows,
         Address out) {
        op_attention(pointer<const void>(query), static_cast<Type>(type), num_heads, from, rows,
                     pointer<void>(out));
      },
      release());
  m.def(
      "hadamard",
      [](Address x, int type, int64_t num_rows, int64_t size, int64_t order, Address out) {
        op_hadamard(pointer<const void>(x), static_cast<Type>(type), num_rows, size, order,
                    pointer<void>(out));
      },
      release());
  m.def(
      "silu_mul",
      [](Address gate_up, int type, int64_t num_rows, int64_t size, Address out) {
        op_silu_mul(pointer<const void>(gate_up), static_cast<Type>(type), num_rows, size,
                    pointer<void>(out));
      },
      release());
}

void bind_step(nb::module_& m) {
  nb::class_<Step>(m, "Step")
      .def(
          "__init__",
          [](Step* self, int64_t hidden, int64_t intermediate, int64_t num_heads,
             int64_t num_kv_heads, int64_t head_dim, int64_t vocabulary, float eps, bool is_float,
             int64_t hadamard, int64_t outliers, const Matrix* embedding, Address final_norm, const PyParts& head,
             Address cos, Address sin, int64_t num_positions) {
            new (self) Step({hidden, intermediate, num_heads, num_kv_heads, head_dim, vocabulary,
                             eps, is_float, hadamard, outliers},
                            embedding, pointer<const float>(final_norm), parts(head),
                            pointer<const float>(cos), pointer<const float>(sin), num_positions);
          },
          nb::kw_only(), "hidden"_a, "intermediate"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "vocabulary"_a, "eps"_a, "is_float"_a, "hadamard"_a, "outliers"_a, "embedding"_a, "final_norm"_a, "head"_a, "cos"_a,
          "sin"_a, "num_positions"_a)
      .def(
          "add_layer",
          [](Step& self, Address input_norm, Address post_norm, Address q_norm, Address k_norm,
             const PyParts& qkv, const PyParts& output, const PyParts& gate_up,
             const PyParts& down) {
            self.add_layer({pointer<const float>(input_norm), pointer<const float>(post_norm),
                            pointer<const float>(q_norm), pointer<const float>(k_norm), parts(qkv),
                            parts(output), parts(gate_up), parts(down)});
          },
          nb::kw_only(), "input_norm"_a, "post_norm"_a, "q_norm"_a, "k_norm"_a, "qkv"_a, "output"_a,
          "gate_up"_a, "down"_a)
      .def("set_cache",
           [](Step& self, const std::vector<const Pools*>& pools) {
             std::vector<Pools> copies;
             for (const Pools* one : pools) copies.push_back(*one);
             self.set_cache(std::move(copies));
           })
      .def(
          "forward",
          [](Step& self, Address tokens, const RowTable& rows, bool is_draft, int activation,
             int64_t group, int head_activation, Address logit_rows, int64_t num_logits,
             Address logits) {
            self.forward(pointer<const int64_t>(tokens), rows, view(is_draft, activation, 0, group),
                         static_cast<Activation>(head_activation), pointer<const int64_t>(logit_rows),
                         num_logits, pointer<float>(logits));
          },
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace qspec

NB_MODULE(_cpu, m) {
  using namespace qspec;
  // Matrices and caches are kept by Python objects until the interpreter ends.
  nb::set_leak_warnings(false);
  nb::object error = nb::module_::import_("qspec_llm.errors").attr("QSpecError");
  nb::register_exception_translator(
      [](const std::exception_ptr& caught, void* type) {
        try {
          std::rethrow_exception(caught);
        } catch (const Error& found) {
          PyErr_SetString(static_cast<PyObject*>(type), found.what());
        }
      },
      error.release().ptr());
  m.attr("PANEL") = kPanel;
  m.def("available_isas", &available_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", &set_isa);
  m.def("num_threads", [] { return pool().size(); });
  m.def("set_num_threads", &set_num_threads);
  m.def("fork_join", [](int64_t times) {
    for (int64_t i = 0; i < times; ++i) pool().run([](int) {});
  });
  m.def("barriers", [](int64_t times) {
    pool().run([&](int) {
      for (int64_t i = 0; i < times; ++i) pool().barrier();
    });
  });
  m.def(
      "read_memory",
      [](Address memory, int64_t size) { return read_memory(pointer<const void>(memory), size); },
      nb::call_guard<nb::gil_scoped_release>());
  bind_matrix(m);
  bind_pools(m);
  bind_rows(m);
  bind_ops(m);
  bind_step(m);
}
