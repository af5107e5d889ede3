// Parameters and launchers of every kernel: plain structs, no torch and no Python.
//
// Strides count elements and may be zero or negative; the last dimension of every operand is dense.
// A launcher validates nothing: the Python layer did.
#pragma once

#include <cstdint>

namespace lightning {

enum class DType : int32_t { float64, float32, bfloat16, float16 };

// One [B, T, H, D] operand.
struct Operand {
  void* data;
  int64_t batch, token, head;
};

// One [N, H, K, V] state whose last two dimensions are dense; data may be null.
struct State {
  void* data;
  int64_t row, head;
};

struct AttentionShape {
  DType dtype;
  int64_t batch, tokens, heads, key_dim, value_dim;
  int64_t sequences;          // N: equals batch unless packed
  const int64_t* cu_seqlens;  // [N + 1] when packed, else null
  const float* decay;         // [H], the rate s >= 0
  double scale;
  int threads;
};

// o_t = scale * S_t^T q_t with S_t = e^{-s} S_{t-1} + k_t v_t^T.
struct AttentionForward {
  AttentionShape shape;
  Operand q, k, v, o;
  State initial, final;  // accumulate dtype; either may be null
};

struct AttentionBackward {
  AttentionShape shape;
  Operand q, k, v, grad_o;
  State initial, grad_final;  // may be null
  Operand grad_q, grad_k, grad_v;
  State grad_initial;
};

// The same recurrence for a few tokens, the state updated in place.
struct AttentionDecode {
  AttentionShape shape;
  Operand q, k, v, o;
  DType state_dtype;
  State state;
  int64_t state_rows;    // S
  const int64_t* slots;  // [B], a row of the state or -1; null: row b
};

// y = x * rstd * weight * sigmoid(gate), rstd = (mean(x^2) + eps)^(-1/2), row by row.
struct GatedRMSNorm {
  DType dtype;
  int64_t rows, dim;
  int64_t x_stride, gate_stride, y_stride;  // between rows; y_stride also serves grad_x and grad_gate
  const void *x, *gate;
  const void* weight;  // accumulate dtype
  double eps;
  void *y, *rstd;  // rstd in the accumulate dtype: written by forward, read by backward
  const void* grad_y;
  int64_t grad_y_stride;
  void *grad_x, *grad_gate;
  void* grad_weight;  // accumulate dtype
  int threads;
};

// One entry per kernel; every instruction set has a table of its own.
struct Kernels {
  const char* name;
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*attention_decode)(const AttentionDecode&);
  void (*gated_rms_norm_forward)(const GatedRMSNorm&);
  void (*gated_rms_norm_backward)(const GatedRMSNorm&);
};

// The tables this machine can run, best first, ended by null.
const Kernels* const* available_kernels();

}  // namespace lightning
