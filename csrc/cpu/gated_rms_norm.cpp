// y = n * w * g with n = x * rstd, rstd = (mean(x^2) + eps)^(-1/2), g = sigmoid(gate), over rows of `dim`.
//
// With e = grad_y * w * g (the gradient of n):
//   grad_x = rstd * (e - n * mean(e n))      grad_gate = grad_y * w * n * g (1 - g)
//   grad_w = sum over rows of grad_y * n * g
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

constexpr int64_t kElementsPerThread = 1 << 14;  // that repay waking a thread

int threads_for(const GatedRMSNorm& p) {
  const int64_t useful = p.rows * p.dim / kElementsPerThread + 1;
  return useful < p.threads ? int(useful) : p.threads;
}

template <class T>
void forward(const GatedRMSNorm& p) {
  using Acc = Accumulate<T>;
  const auto* weight = static_cast<const Acc*>(p.weight);

#pragma omp parallel for schedule(static) num_threads(threads_for(p))
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    T* y = static_cast<T*>(p.y) + row * p.y_stride;
    LongSum<Acc> squares;
    for_vectors<Acc>(p.dim, [&](int64_t j, auto count) {
      const Vector<Acc> v = load_first(x + j, count);
      squares.add(v * v);
    });
    const Acc rstd = Acc(1 / std::sqrt(double(squares.value()) / double(p.dim) + p.eps));
    static_cast<Acc*>(p.rstd)[row] = rstd;
    for_vectors<Acc>(p.dim, [&](int64_t j, auto count) {
      const Vector<Acc> n = load_first(x + j, count) * broadcast(rstd);
      store_first(y + j, n * load_first(weight + j, count) * sigmoid<Acc>(load_first(gate + j, count)), count);
    });
  }
}

template <class T>
void backward(const GatedRMSNorm& p) {
  using Acc = Accumulate<T>;
  constexpr int64_t kLanes = kWidth<Acc>;
  const int64_t dim_padded = (p.dim + kLanes - 1) / kLanes * kLanes;
  const auto* weight = static_cast<const Acc*>(p.weight);
  const int threads = threads_for(p);
  // A partial sum of grad_weight for each block of rows, added in order: bitwise repeatable. The sums are compensated
  // (Kahan), as there may be a million rows: what an addition lost is in the second half and goes into the next.
  const int64_t stride = 2 * dim_padded;
  const Buffer partial_buffer(size_t(threads * stride) * sizeof(Acc));
  auto* const partials = static_cast<Acc*>(partial_buffer.data());

#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int block = 0; block < threads; ++block) {
    Acc* const grad_weight = partials + block * stride;
    Acc* const lost = grad_weight + dim_padded;
    std::memset(grad_weight, 0, size_t(stride) * sizeof(Acc));
    auto* const e_row = static_cast<Acc*>(thread_scratch(size_t(dim_padded) * sizeof(Acc)));
    for (int64_t row = p.rows * block / threads; row < p.rows * (block + 1) / threads; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
      const T* grad_y = static_cast<const T*>(p.grad_y) + row * p.grad_y_stride;
      T* grad_x = static_cast<T*>(p.grad_x) + row * p.y_stride;
      T* grad_gate = static_cast<T*>(p.grad_gate) + row * p.y_stride;
      const Vector<Acc> rstd = broadcast(static_cast<const Acc*>(p.rstd)[row]), one = broadcast(Acc(1));
      LongSum<Acc> e_dot_n;
      for_vectors<Acc>(p.dim, [&](int64_t j, auto count) {
        const Vector<Acc> n = load_first(x + j, count) * rstd, g = sigmoid<Acc>(load_first(gate + j, count));
        const Vector<Acc> dy = load_first(grad_y + j, count), e = dy * load_first(weight + j, count) * g;
        const Vector<Acc> term = dy * n * g - load(lost + j), before = load(grad_weight + j), after = before + term;
        store(lost + j, (after - before) - term);
        store(grad_weight + j, after);
        store_first(grad_gate + j, e * n * (one - g), count);
        store(e_row + j, e);
        e_dot_n.add(e * n);
      });
      const Vector<Acc> mean = broadcast(e_dot_n.value() / Acc(p.dim));
      for_vectors<Acc>(p.dim, [&](int64_t j, auto count) {
        const Vector<Acc> n = load_first(x + j, count) * rstd;
        store_first(grad_x + j, rstd * (load(e_row + j) - n * mean), count);
      });
    }
  }
  auto* const grad_weight = static_cast<Acc*>(p.grad_weight);
  for (int64_t j = 0; j < p.dim; ++j) {
    Acc total = 0;
    for (int block = 0; block < threads; ++block) total += partials[block * stride + j];
    grad_weight[j] = total;
  }
}

}  // namespace

void gated_rms_norm_forward(const GatedRMSNorm& p) {
  dispatch(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

void gated_rms_norm_backward(const GatedRMSNorm& p) {
  dispatch(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
