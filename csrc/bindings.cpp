// The Python module lightning_attn._C: unpacks arguments into the structs of lightning.h and calls a launcher.
//
// A tensor arrives as (address, strides...): the extension knows no torch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/runtime.h"
#include "cuda/emulator.h"
#include "lightning.h"

namespace py = pybind11;
using namespace lightning;

namespace {

const Kernels* active = available_kernels()[0];

template <class P>
void launch(void (*kernel)(const P&), const P& parameters) {
  py::gil_scoped_release released;
  kernel(parameters);
}

void* address(const py::handle& value) { return reinterpret_cast<void*>(value.cast<uintptr_t>()); }

// (address, batch, token, head strides)
Operand operand(const py::tuple& x) {
  return {address(x[0]), x[1].cast<int64_t>(), x[2].cast<int64_t>(), x[3].cast<int64_t>()};
}

// (address, row stride, head stride) or None
State state(const py::object& x) {
  if (x.is_none()) return {};
  const py::tuple t = x;
  return {address(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

// (dtype, B, T, H, K, V, N, cu_seqlens address or 0, decay address, scale, threads)
AttentionShape shape(const py::tuple& x) {
  AttentionShape s{};
  s.dtype = x[0].cast<DType>();
  s.batch = x[1].cast<int64_t>();
  s.tokens = x[2].cast<int64_t>();
  s.heads = x[3].cast<int64_t>();
  s.key_dim = x[4].cast<int64_t>();
  s.value_dim = x[5].cast<int64_t>();
  s.sequences = x[6].cast<int64_t>();
  s.cu_seqlens = static_cast<const int64_t*>(address(x[7]));
  s.decay = static_cast<const float*>(address(x[8]));
  s.scale = x[9].cast<double>();
  s.threads = x[10].cast<int>();
  return s;
}

// The members of a struct, in their order, from a tuple: addresses for pointers.
class Fields {
 public:
  explicit Fields(const py::tuple& values) : values_(values) {}
  template <class T>
  operator T() {
    const py::object value = values_[next_++];
    if constexpr (std::is_pointer_v<T>)
      return static_cast<T>(address(value));
    else
      return value.cast<T>();
  }

 private:
  const py::tuple& values_;
  size_t next_ = 0;
};

// (dtype, rows, dim, x stride, gate stride, y stride, eps, threads)
GatedRMSNorm norm(const py::tuple& s, const py::handle& x, const py::handle& gate, const py::handle& weight,
                  const py::handle& rstd) {
  GatedRMSNorm p{};
  p.dtype = s[0].cast<DType>();
  p.rows = s[1].cast<int64_t>();
  p.dim = s[2].cast<int64_t>();
  p.x_stride = s[3].cast<int64_t>();
  p.gate_stride = s[4].cast<int64_t>();
  p.y_stride = s[5].cast<int64_t>();
  p.eps = s[6].cast<double>();
  p.threads = s[7].cast<int>();
  p.x = address(x);
  p.gate = address(gate);
  p.weight = address(weight);
  p.rstd = address(rstd);
  return p;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto* k = available_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (auto* k = available_kernels(); *k; ++k)
    if (name == (*k)->name) {
      active = *k;
      return;
    }
  std::string known;
  for (const auto& n : instruction_sets()) known += (known.empty() ? "" : ", ") + n;
  throw py::value_error("expected one of the instruction sets " + known + ", got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of lightning_attn; lightning_attn.backends.cpu is their caller.";

  py::enum_<DType>(m, "DType")
      .value("float64", DType::float64)
      .value("float32", DType::float32)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16);

  m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
  m.def("instruction_set", [] { return std::string(active->name); }, "What the kernels use now.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "For tests: any of `instruction_sets()`.");

  m.def("attention_forward", [](const py::tuple& s, const py::tuple& q, const py::tuple& k, const py::tuple& v,
                                const py::tuple& o, const py::object& initial, const py::object& final) {
    launch(active->attention_forward,
           {shape(s), operand(q), operand(k), operand(v), operand(o), state(initial), state(final)});
  });

  m.def("attention_backward",
        [](const py::tuple& s, const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& grad_o,
           const py::object& initial, const py::object& grad_final, const py::tuple& grad_q, const py::tuple& grad_k,
           const py::tuple& grad_v, const py::object& grad_initial) {
          launch(active->attention_backward,
                 {shape(s), operand(q), operand(k), operand(v), operand(grad_o), state(initial), state(grad_final),
                  operand(grad_q), operand(grad_k), operand(grad_v), state(grad_initial)});
        });

  m.def("attention_state", [](const py::tuple& s, const py::tuple& k, const py::tuple& v, const py::object& initial,
                              const py::object& final, bool reverse) {
    launch(active->attention_state, {shape(s), operand(k), operand(v), state(initial), state(final), reverse});
  });

  m.def("attention_history", [](const py::tuple& s, const py::tuple& x, const py::tuple& out, const py::object& states,
                                bool reverse) {
    launch(active->attention_history, {shape(s), operand(x), operand(out), state(states), reverse});
  });

  m.def("attention_decode",
        [](const py::tuple& s, const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::tuple& o,
           DType state_dtype, const py::object& states, int64_t state_rows, const py::handle& slots) {
          launch(active->attention_decode,
                 {shape(s), operand(q), operand(k), operand(v), operand(o), state_dtype, state(states), state_rows,
                  static_cast<const int64_t*>(address(slots))});
        });

  m.def("gated_rms_norm_forward", [](const py::tuple& s, const py::handle& x, const py::handle& gate,
                                     const py::handle& weight, const py::handle& y, const py::handle& rstd) {
    GatedRMSNorm p = norm(s, x, gate, weight, rstd);
    p.y = address(y);
    launch(active->gated_rms_norm_forward, p);
  });

  m.def("gated_rms_norm_backward",
        [](const py::tuple& s, const py::handle& grad_y, int64_t grad_y_stride, const py::handle& x,
           const py::handle& gate, const py::handle& weight, const py::handle& rstd, const py::handle& grad_x,
           const py::handle& grad_gate, const py::handle& grad_weight) {
          GatedRMSNorm p = norm(s, x, gate, weight, rstd);
          p.grad_y = address(grad_y);
          p.grad_y_stride = grad_y_stride;
          p.grad_x = address(grad_x);
          p.grad_gate = address(grad_gate);
          p.grad_weight = address(grad_weight);
          launch(active->gated_rms_norm_backward, p);
        });

  // Of the mixture of experts: one tuple with the members of the kernel's struct.
  m.def("moe_route_forward", [](const py::tuple& x) {
    Fields f(x);
    launch(active->moe_route_forward, {f, f, f, f, f, f, f, f, f, f, f, f, f});
  });
  m.def("moe_route_backward", [](const py::tuple& x) {
    Fields f(x);
    launch(active->moe_route_backward, {f, f, f, f, f, f, f, f, f, f, f, f, f});
  });
  m.def("moe_sort", [](const py::tuple& x) {
    Fields f(x);
    launch(active->moe_sort, {f, f, f, f, f, f});
  });
  m.def("gather_rows", [](const py::tuple& x) {
    Fields f(x);
    launch(active->gather_rows, {f, f, f, f, f, f, f, f, f, f});
  });
  m.def("swiglu_forward", [](const py::tuple& x) {
    Fields f(x);
    launch(active->swiglu_forward, {f, f, f, f, f, f, f, f, f, f, f, f});
  });
  m.def("swiglu_backward", [](const py::tuple& x) {
    Fields f(x);
    launch(active->swiglu_backward, {f, f, f, f, f, f, f, f, f, f, f, f, f});
  });
  m.def("gather_sum", [](const py::tuple& x) {
    Fields f(x);
    launch(active->gather_sum, {f, f, f, f, f, f, f, f, f, f});
  });
  m.def("expert_rows", [](const py::tuple& x) {
    Fields f(x);
    launch(active->expert_rows, {f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f});
  });
  m.def("widen_int8", [](const py::tuple& x) {
    Fields f(x);
    launch(active->widen_int8, {f, f, f, f, f, f, f});
  });
  m.def("transpose", [](const py::tuple& x) {
    Fields f(x);
    launch(active->transpose, {f, f, f, f, f, f, f, f, f, f, f});
  });
  m.attr("OUTER_ROWS") = kOuterRows;
  m.def("outer_product", [](const py::tuple& x) {
    Fields f(x);
    launch(active->outer_product, {f, f, f, f, f, f, f, f, f, f, f});
  });

  m.def("can_emulate_cuda", &can_emulate, "Whether this build can run the kernels of csrc/cuda on the CPU.");
  m.def("emulate_cuda", [](const std::string& name, int64_t blocks, size_t shared, const std::string& parameters) {
    const py::gil_scoped_release released;
    emulate(name.c_str(), blocks, shared, parameters.data(), parameters.size());
  });
}
