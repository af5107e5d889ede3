// What a mixture of experts does between its products of matrices, row by row:
//
//   gather_rows      to_r = x[order_r / k]
//   swiglu_forward   a = g sigmoid(g) u
//   gather_sum       y_t = sum over j of w_tj z[position_tj]
//
// and SwiGLU's backward for the result w * a, given b, the gradient of w * a, with s = sigmoid(g):
//   grad_g = w b u s (1 + g (1 - s))     grad_u = w b g s     grad_w = sum of b g s u
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

int threads_for(int64_t elements, int threads) {
  const int64_t useful = elements / (1 << 14) + 1;  // work that repays waking a thread
  return useful < threads ? int(useful) : threads;
}

// silu is zero below -100 in every dtype, but exp() saturates, and a huge factor would show it. NaN passes.
template <class Acc>
LIGHTNING_INLINE Vector<Acc> bounded(Vector<Acc> g) {
#ifdef LIGHTNING_GNU_VECTORS
  const Vector<Acc> low = broadcast(Acc(-100));
  return g < low ? low : g;
#else
  for (int i = 0; i < kWidth<Acc>; ++i) g[i] = g[i] < -100 ? -100 : g[i];
  return g;
#endif
}

template <class T>
void gather(const GatherRows& p) {
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows * p.dim, p.threads))
  for (int64_t r = 0; r < p.padded_rows; ++r) {
    T* const to = static_cast<T*>(p.to) + r * p.dim;
    if (r >= p.rows) {
      std::memset(to, 0, size_t(p.dim) * sizeof(T));
      continue;
    }
    const int64_t from = p.order ? p.order[r] / p.top_k : r;
    std::memcpy(to, static_cast<const T*>(p.x) + from * p.x_stride, size_t(p.dim) * sizeof(T));
  }
}

template <class T>
void swiglu(const SwiGLU& p) {
  using Acc = Accumulate<T>;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows * p.columns, p.threads))
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* const gate = static_cast<const T*>(p.gate) + r * p.stride;
    const T* const up = static_cast<const T*>(p.up) + r * p.stride;
    T* const a = static_cast<T*>(p.a) + r * p.a_stride;
    const Vector<Acc> gate_scale = broadcast(p.gate_scale ? Acc(p.gate_scale[r * p.scale_stride]) : Acc(1));
    const Vector<Acc> up_scale = broadcast(p.up_scale ? Acc(p.up_scale[r * p.scale_stride]) : Acc(1));
    for_vectors<Acc>(p.columns, [&](int64_t j, auto count) {
      const Vector<Acc> g = bounded<Acc>(load_first(gate + j, count) * gate_scale);
      const Vector<Acc> u = load_first(up + j, count) * up_scale;
      store_first(a + j, g * sigmoid<Acc>(g) * u, count);
    });
  }
}

// g_0 u_0 g_1 u_1 ... for the first `count` of both.
template <class T, class Acc = Accumulate<T>>
LIGHTNING_INLINE void store_in_turns(T* to, const Vector<Acc>& g, const Vector<Acc>& u, int64_t count) {
  constexpr int kLanes = kWidth<Acc>;
  T gs[kLanes], us[kLanes], both[2 * kLanes];
  store_as(gs, g);
  store_as(us, u);
  for (int i = 0; i < kLanes; ++i) {
    both[2 * i] = gs[i];
    both[2 * i + 1] = us[i];
  }
  if (count >= kLanes) {
    std::memcpy(to, both, sizeof both);
  } else {
    std::memcpy(to, both, size_t(2 * count) * sizeof(T));
  }
}

template <class T>
void swiglu_gradients(const SwiGLUBackward& p) {
  using Acc = Accumulate<T>;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows * p.dim, p.threads))
  for (int64_t r = 0; r < p.padded_rows; ++r) {
    T* const grad_h = static_cast<T*>(p.grad_h) + r * 2 * p.dim;
    T* const weighted_a = static_cast<T*>(p.weighted_a) + r * p.dim;
    if (r >= p.rows) {
      std::memset(grad_h, 0, size_t(2 * p.dim) * sizeof(T));
      std::memset(weighted_a, 0, size_t(p.dim) * sizeof(T));
      continue;
    }
    const T* const gate = static_cast<const T*>(p.h) + r * 2 * p.dim;
    const T* const up = gate + p.dim;
    const T* const grad_a = static_cast<const T*>(p.grad_a) + r * p.dim;
    const int64_t pair = p.order[r];
    const Vector<Acc> w = broadcast(static_cast<const Acc*>(p.weights)[pair]), one = broadcast(Acc(1));
    LongSum<Acc> dot;
    for_vectors<Acc>(p.dim, [&](int64_t j, auto count) {
      const Vector<Acc> g = bounded<Acc>(load_first(gate + j, count)), u = load_first(up + j, count);
      const Vector<Acc> b = load_first(grad_a + j, count), s = sigmoid<Acc>(g), silu = g * s, a = silu * u;
      const Vector<Acc> wb = w * b, grad_g = wb * u * s * (one + g * (one - s)), grad_u = wb * silu;
      dot.add(b * a);
      store_first(weighted_a + j, w * a, count);
      if (p.interleaved) {
        store_in_turns<T>(grad_h + 2 * j, grad_g, grad_u, count);
      } else {
        store_first(grad_h + j, grad_g, count);
        store_first(grad_h + p.dim + j, grad_u, count);
      }
    });
    static_cast<Acc*>(p.grad_weights)[pair] = dot.value();
  }
}

template <class T, class Z>
void sum_rows(const GatherSum& p) {
  using Acc = Accumulate<T>;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.tokens * p.top_k * p.dim, p.threads))
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int32_t* const position = p.position + t * p.top_k;
    const Acc* const weights = static_cast<const Acc*>(p.weights) + t * p.top_k;
    for_vectors<Acc>(p.dim, [&](int64_t i, auto count) {
      Vector<Acc> y{};
      for (int64_t j = 0; j < p.top_k; ++j) {
        if (position[j] < 0) continue;
        const Vector<Acc> z = load_first(static_cast<const Z*>(p.z) + position[j] * p.dim + i, count);
        y += p.weights ? z * broadcast(weights[j]) : z;
      }
      store_first(static_cast<T*>(p.y) + t * p.dim + i, y, count);
    });
  }
}

}  // namespace

void gather_rows(const GatherRows& p) {
  dispatch(p.dtype, [&](auto type) { gather<typename decltype(type)::type>(p); });
}

void swiglu_forward(const SwiGLU& p) {
  dispatch(p.dtype, [&](auto type) { swiglu<typename decltype(type)::type>(p); });
}

void swiglu_backward(const SwiGLUBackward& p) {
  dispatch(p.dtype, [&](auto type) { swiglu_gradients<typename decltype(type)::type>(p); });
}

void gather_sum(const GatherSum& p) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    p.wide ? sum_rows<T, Accumulate<T>>(p) : sum_rows<T, T>(p);
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
