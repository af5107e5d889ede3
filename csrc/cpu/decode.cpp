// New tokens against a stored state, which is read once and written once for all of them (up to kRun):
//
//   for each row i of S:  for each token t:  S_i <- lambda S_i + k_t[i] v_t;   o_t += q_t[i] S_i
//
// The state's traffic is the time (K * V elements a head, read and written); the rest stays in the L1 cache.
#include "kernels.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {
namespace {

constexpr int64_t kPanelVectors = 8;  // columns of the state taken at a time, so that their outputs stay in L1 too
constexpr int64_t kRun = 64;          // tokens taken at a time: bounds the scratch memory

// A head of one operand, [T, D] in the accumulate type, D padded to whole vectors with zeros.
template <class Acc, class T>
void widen(Acc* to, const T* from, int64_t stride, int64_t tokens, int64_t dim, int64_t padded_dim) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < padded_dim; j += kWidth<Acc>)
      store(to + t * padded_dim + j, j < dim ? load_first(from + t * stride + j, dim - j) : Vector<Acc>{});
}

template <class T, class S, class Acc = Accumulate<T>>
void step(const AttentionDecode& p, const T* q, const T* k, const T* v, T* o, int64_t tokens, S* state, double rate) {
  constexpr int64_t kLanes = kWidth<Acc>;
  // In two parts: what rounding takes from a slow decay would be lost again at every token ever decoded.
  const Acc lambda = Acc(std::exp(-rate)), correction = Acc(std::exp(-rate) - double(lambda));
  const int64_t key_dim = p.shape.key_dim, value_dim = p.shape.value_dim;
  const auto whole = [](int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; };
  const int64_t key_pad = whole(key_dim), value_pad = whole(value_dim);
  Acc* const qs = static_cast<Acc*>(thread_scratch(size_t(2 * tokens * (key_pad + value_pad)) * sizeof(Acc)));
  Acc* const ks = qs + tokens * key_pad;
  Acc* const vs = ks + tokens * key_pad;
  Acc* const os = vs + tokens * value_pad;
  widen(qs, q, p.q.token, tokens, key_dim, key_pad);
  widen(ks, k, p.k.token, tokens, key_dim, key_pad);
  widen(vs, v, p.v.token, tokens, value_dim, value_pad);
  std::memset(os, 0, size_t(tokens * value_pad) * sizeof(Acc));

  for (int64_t panel = 0; panel < value_dim; panel += kPanelVectors * kLanes) {
    const int64_t rest = value_dim - panel;
    const auto vectors = int((rest < kPanelVectors * kLanes ? whole(rest) : kPanelVectors * kLanes) / kLanes);
    for (int64_t i = 0; i < key_dim; ++i) {
      S* const row = state + i * value_dim + panel;
      Vector<Acc> s[kPanelVectors];
      for (int x = 0; x < vectors; ++x) s[x] = load_first(row + x * kLanes, rest - x * kLanes);
      for (int64_t t = 0; t < tokens; ++t) {
        const Vector<Acc> k_i = broadcast(ks[t * key_pad + i]), q_i = broadcast(qs[t * key_pad + i]);
        const Acc* const v_t = vs + t * value_pad + panel;
        Acc* const o_t = os + t * value_pad + panel;
        for (int x = 0; x < vectors; ++x) {
          s[x] = s[x] * broadcast(lambda) + (s[x] * broadcast(correction) + k_i * load(v_t + x * kLanes));
          store(o_t + x * kLanes, load(o_t + x * kLanes) + q_i * s[x]);
        }
      }
      for (int x = 0; x < vectors; ++x) store_first(row + x * kLanes, s[x], rest - x * kLanes);
    }
  }
  const Vector<Acc> scale = broadcast(Acc(p.shape.scale));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < value_dim; j += kLanes)
      store_first(o + t * p.o.token + j, load(os + t * value_pad + j) * scale, value_dim - j);
}

template <class T, class S>
void decode(const AttentionDecode& p) {
  const int64_t batch = p.shape.batch, heads = p.shape.heads, value_dim = p.shape.value_dim;
  const double bytes = double(batch) * double(heads) * double(p.shape.key_dim * value_dim) * sizeof(S);
  const int threads = bytes < (1 << 18) ? 1 : p.shape.threads;  // below that, waking a thread costs more

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < batch * heads; ++task) {
    const int64_t b = task / heads, h = task % heads;
    const auto at = [&](const Operand& x) { return static_cast<T*>(x.data) + b * x.batch + h * x.head; };
    const int64_t row = p.slots ? p.slots[b] : b;
    if (row < 0 || row >= p.state_rows) {
      for (int64_t t = 0; t < p.shape.tokens; ++t)
        std::memset(at(p.o) + t * p.o.token, 0, size_t(value_dim) * sizeof(T));
      continue;
    }
    S* const state = static_cast<S*>(p.state.data) + row * p.state.row + h * p.state.head;
    for (int64_t t = 0; t < p.shape.tokens; t += kRun) {
      const int64_t rest = p.shape.tokens - t;
      step<T, S>(p, at(p.q) + t * p.q.token, at(p.k) + t * p.k.token, at(p.v) + t * p.v.token, at(p.o) + t * p.o.token,
                 rest < kRun ? rest : kRun, state, p.shape.decay[h]);
    }
  }
}

}  // namespace

void attention_decode(const AttentionDecode& p) {
  dispatch(p.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.state_dtype == DType::bfloat16) {
      if constexpr (!std::is_same_v<T, double>) decode<T, bfloat16>(p);
    } else {
      decode<T, Accumulate<T>>(p);
    }
  });
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
