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

// The state alone that a pass over one dense batch leaves: lambda^T initial + scale * the sum of lambda^(T-1-j) k_j v_j^T,
// or backward in time lambda^T initial + scale * the sum of lambda^(t+1) k_t v_t^T. Tokens whose weight is zero in the
// accumulate dtype are not read, nor then `initial`.
struct AttentionState {
  AttentionShape shape;
  Operand k, v;
  State initial, final;  // accumulate dtype; `initial` may be null
  bool reverse;
};

// In place: out_t += scale * lambda^(t+1) S^T x_t, or with `reverse` scale * lambda^(T-1-t) S^T x_t, of one dense batch. x is
// [B, T, H, K], out [B, T, H, V].
struct AttentionHistory {
  AttentionShape shape;
  Operand x, out;
  State state;  // accumulate dtype
  bool reverse;
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

// ---- Mixture of experts. A pair p = t * top_k + j is token t with the j-th of its experts; `order` lists the pairs by
// expert. The rows of an operand are `..._stride` elements apart.

// weights = softmax(logits) at the top_k largest of each row, divided by their sum if `renormalize`.
struct MoeRoute {
  DType dtype;  // of logits and grad_logits; weights and grad_weights have the accumulate dtype
  int64_t tokens, experts, top_k;
  bool renormalize;
  const void* logits;
  int64_t logits_stride;
  void* weights;    // [T, k]: written by forward
  int32_t* chosen;  // [T, k]: written by forward, read by backward
  const void* grad_weights;
  int64_t grad_weights_stride;
  void* grad_logits;  // [T, E]
  int threads;
};

// The pairs by expert, stable; those whose expert is not in [0, experts) come last and have position -1.
struct MoeSort {
  int64_t pairs, experts;
  const int32_t* chosen;             // [pairs]
  int32_t *order, *position, *offs;  // [pairs], [pairs], [experts]
};

// to[r] = x[order[r] / top_k] (x[r] if order is null); zero for rows <= r < padded_rows.
struct GatherRows {
  DType dtype;
  int64_t rows, padded_rows, dim;
  const void* x;
  int64_t x_stride;
  const int32_t* order;
  int64_t top_k;
  void* to;  // [padded_rows, dim]
  int threads;
};

// a = silu(gate) * up, with gate and up first multiplied by a factor for each row unless those are null.
struct SwiGLU {
  DType dtype;
  int64_t rows, columns;
  const void *gate, *up;
  int64_t stride;
  const float *gate_scale, *up_scale;
  int64_t scale_stride;
  void* a;
  int64_t a_stride;
  int threads;
};

// The gradients of SwiGLU's inputs from that of w * a, with w = weights[order[r]] the router's weight of row r.
struct SwiGLUBackward {
  DType dtype;
  int64_t rows, padded_rows, dim;
  bool interleaved;      // the columns of grad_h: gate and up in turns, or all of gate first
  const void* grad_a;    // [rows, dim]: the gradient of w * a
  const void* h;         // [rows, 2 * dim]: gate, then up
  const void* weights;   // [pairs] in the accumulate dtype
  const int32_t* order;  // [rows]
  void* grad_h;          // [padded_rows, 2 * dim]; zero past `rows`
  void* weighted_a;      // [padded_rows, dim] = w * a; zero past `rows`
  void* grad_weights;    // [pairs] in the accumulate dtype
  int threads;
};

// y_t = sum over j of weights[t, j] * z[position[t, j]], in the order of j; a position of -1 adds nothing.
struct GatherSum {
  DType dtype;
  bool wide;  // z has the accumulate dtype
  int64_t tokens, top_k, dim;
  const void* z;
  const int32_t* position;
  const void* weights;  // accumulate dtype; null: 1
  void* y;              // [T, dim]
  int threads;
};

// y[r, n] = scale[e, n] * <x[order[r] / top_k], w[e, n]> for every row r of each group e of at most max_rows rows.
struct ExpertRows {
  DType dtype;
  bool wide;         // y has the accumulate dtype
  bool interleaved;  // column n of the product goes to n / 2 in the first (n even) or the second half of y
  int64_t experts, rows, dim, width, max_rows;
  const int32_t* offs;  // [experts]: where each group ends
  const void* x;
  int64_t x_stride;
  const int32_t* order;  // null: row r of x
  int64_t top_k;
  const void* w;  // [experts, width, dim], int8 if there is a scale
  int64_t w_expert, w_row;
  const float* scale;  // [experts, width] or null
  void* y;             // [rows, width]
  int threads;
};

// to = x / 128: exact, and as harmless a factor for float16 sums as a usual weight.
struct WidenInt8 {
  DType dtype;
  int64_t rows, dim;
  const int8_t* x;
  int64_t x_stride;
  void* to;  // [rows, dim]
  int threads;
};

// to[c, r] = scale[r] * x[r, c]; scale may be null.
struct Transpose {
  DType dtype;
  bool wide;  // `to` has the accumulate dtype
  int64_t rows, columns;
  const void* x;
  int64_t x_stride;
  const float* scale;
  int64_t scale_stride;
  void* to;
  int64_t to_stride;
  int threads;
};

constexpr int64_t kOuterRows = 4;  // of more, the sums take longer than the writing

// to[n, k] = sum over r of a[r, n] b[r, k] for at most kOuterRows rows; zeros if there are none.
struct OuterProduct {
  DType dtype;
  bool past_caches;  // `to` belongs to more memory than they hold
  int64_t rows, width, dim;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void* to;  // [width, dim]
  int threads;
};

// One entry per kernel; every instruction set has a table of its own.
struct Kernels {
  const char* name;
  void (*attention_forward)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&);
  void (*attention_state)(const AttentionState&);
  void (*attention_history)(const AttentionHistory&);
  void (*attention_decode)(const AttentionDecode&);
  void (*gated_rms_norm_forward)(const GatedRMSNorm&);
  void (*gated_rms_norm_backward)(const GatedRMSNorm&);
  void (*moe_route_forward)(const MoeRoute&);
  void (*moe_route_backward)(const MoeRoute&);
  void (*moe_sort)(const MoeSort&);
  void (*gather_rows)(const GatherRows&);
  void (*swiglu_forward)(const SwiGLU&);
  void (*swiglu_backward)(const SwiGLUBackward&);
  void (*gather_sum)(const GatherSum&);
  void (*expert_rows)(const ExpertRows&);
  void (*widen_int8)(const WidenInt8&);
  void (*transpose)(const Transpose&);
  void (*outer_product)(const OuterProduct&);
};

// The tables this machine can run, best first, ended by null.
const Kernels* const* available_kernels();

}  // namespace lightning
