// The router of a mixture of experts, for each token's row of logits l [E]:
//
//   chosen = the k largest, equal ones by rising number, NaN below all     weights_j = exp(l_chosen_j) / sum
//
// with the sum of e^l over all experts, or (renormalize) over the chosen ones. Its backward:
//
//   grad_l_e = [e = chosen_j] weights_j grad_j - m softmax(l)_e,   m = sum over j of weights_j grad_j
//
// with the softmax over the same experts, zero elsewhere. And the pairs of token and expert, sorted by expert.
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

int threads_for(const MoeRoute& p) {
  const int64_t useful = p.tokens * p.experts / (1 << 13) + 1;  // work that repays waking a thread
  return useful < p.threads ? int(useful) : p.threads;
}

// How many elements take `count` in whole vectors of any type.
size_t padded(int64_t count) {
  constexpr size_t kUnit = LIGHTNING_VECTOR_BYTES;
  return (size_t(count) + kUnit - 1) / kUnit * kUnit;
}

// A token's logits, to memory for padded(p.experts).
template <class T>
void widen(const MoeRoute& p, int64_t t, Accumulate<T>* to) {
  const T* const row = static_cast<const T*>(p.logits) + t * p.logits_stride;
  for_vectors<Accumulate<T>>(p.experts, [&](int64_t e, auto count) { store(to + e, load_first(row + e, count)); });
}

template <class Acc>
bool before(Acc a, Acc b) {
  return a > b || (b != b && a == a);
}

template <class T>
void forward(const MoeRoute& p) {
  using Acc = Accumulate<T>;
#pragma omp parallel for schedule(static) num_threads(threads_for(p))
  for (int64_t t = 0; t < p.tokens; ++t) {
    Acc* const weights = static_cast<Acc*>(p.weights) + t * p.top_k;
    int32_t* const chosen = p.chosen + t * p.top_k;
    Acc* const logits = static_cast<Acc*>(thread_scratch(padded(p.experts) * (sizeof(Acc) + 1)));
    char* const taken = reinterpret_cast<char*>(logits + padded(p.experts));
    widen<T>(p, t, logits);
    std::memset(taken, 0, size_t(p.experts));
    for (int64_t j = 0; j < p.top_k; ++j) {
      int64_t best = -1;
      for (int64_t e = 0; e < p.experts; ++e)
        if (!taken[e] && (best < 0 || before(logits[e], logits[best]))) best = e;
      taken[best] = 1;
      chosen[j] = int32_t(best);
      weights[j] = logits[best];
    }
    // Less the largest; nothing where that is infinite, as the quotients are then 0 or NaN like torch.logsumexp's.
    const Acc largest = p.top_k > 0 ? weights[0] : 0, shift = !p.renormalize && std::isinf(largest) ? 0 : largest;
    double sum = 0;
    if (p.renormalize)
      for (int64_t j = 0; j < p.top_k; ++j) sum += std::exp(weights[j] - shift);
    else
      for (int64_t e = 0; e < p.experts; ++e) sum += std::exp(logits[e] - shift);
    for (int64_t j = 0; j < p.top_k; ++j) weights[j] = Acc(std::exp(weights[j] - shift) / sum);
  }
}

// In double and from the logits, as with weights near 1 nearly all of the terms cancels.
template <class T>
void backward(const MoeRoute& p) {
  using Acc = Accumulate<T>;
#pragma omp parallel for schedule(static) num_threads(threads_for(p))
  for (int64_t t = 0; t < p.tokens; ++t) {
    const Acc* const grad_weights = static_cast<const Acc*>(p.grad_weights) + t * p.grad_weights_stride;
    const int32_t* const chosen = p.chosen + t * p.top_k;
    T* const to = static_cast<T*>(p.grad_logits) + t * p.experts;
    double* const softmax = static_cast<double*>(thread_scratch(padded(p.experts) * (sizeof(double) + sizeof(Acc))));
    Acc* const row = reinterpret_cast<Acc*>(softmax + padded(p.experts));
    widen<T>(p, t, row);
    // The softmax of the chosen ones, or of all of them.
    const int64_t count = p.renormalize ? p.top_k : p.experts;
    const auto expert = [&](int64_t i) { return p.renormalize ? int64_t(chosen[i]) : i; };
    double sum = 0, mean = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t e = expert(i);
      sum += softmax[e] = std::exp(double(row[e]) - double(row[chosen[0]]));  // minus the largest
    }
    for (int64_t i = 0; i < count; ++i) softmax[expert(i)] /= sum;
    for (int64_t j = 0; j < p.top_k; ++j) mean += softmax[chosen[j]] * double(grad_weights[j]);
    std::memset(row, 0, size_t(p.experts) * sizeof(Acc));
    for (int64_t i = 0; i < count; ++i) row[expert(i)] = Acc(-mean * softmax[expert(i)]);
    for (int64_t j = 0; j < p.top_k; ++j) row[chosen[j]] = Acc(softmax[chosen[j]] * (double(grad_weights[j]) - mean));
    for_vectors<Acc>(p.experts, [&](int64_t e, auto n) { store_first(to + e, load(row + e), n); });
  }
}

}  // namespace

void moe_route_forward(const MoeRoute& p) {
  dispatch(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

void moe_route_backward(const MoeRoute& p) {
  dispatch(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p); });
}

// A counting sort on one thread: it takes microseconds where the products take milliseconds.
void moe_sort(const MoeSort& p) {
  const Buffer next_buffer(size_t(p.experts + 1) * sizeof(int32_t));
  auto* const next = static_cast<int32_t*>(next_buffer.data());
  std::memset(next, 0, size_t(p.experts + 1) * sizeof(int32_t));
  const auto group = [&](int64_t i) {
    const int32_t e = p.chosen[i];
    return e >= 0 && e < p.experts ? e : p.experts;
  };
  for (int64_t i = 0; i < p.pairs; ++i) ++next[group(i)];
  int32_t end = 0;
  for (int64_t e = 0; e <= p.experts; ++e) {
    const int32_t begin = end;
    end += next[e];
    next[e] = begin;
    if (e < p.experts) p.offs[e] = end;
  }
  for (int64_t i = 0; i < p.pairs; ++i) {
    const int64_t e = group(i);
    const int32_t place = next[e]++;
    p.order[place] = int32_t(i);
    p.position[i] = e < p.experts ? place : -1;
  }
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
