// The experts of each token, and their weights:
//
//   l [T, E] -> the k largest of a row, equal ones by rising id; e^{l_j - max} of each over the sum of that over all,
//   or with `renormalize` over the k chosen
//
// A warp has a token, its logits in registers: a lane every 32nd, PER of them. Each of k rounds takes the largest that
// is left. No sum depends on which thread is first.
//
// One source for nvcc (ahead of time) and NVRTC (at first use), behind prelude.cuh. Offsets are 64-bit.

struct Route {
  const void* logits;  // [T, E], rows `row` elements apart
  int64 row;
  float* weights;  // [T, k]
  int* experts;    // [T, k]
  int64 tokens, num_experts, top_k, renormalize;
  const float* dweights;  // [T, k], rows `dweights_row` apart; it and dlogits [T, E] are the backward's
  int64 dweights_row;
  void* dlogits;
};

// Each lane gets the same bits.
__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

__device__ inline float max_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

// Grows with x, and is never 0: NaN comes before -inf, and -0 is 0. In bits, for a comparison would flush subnormals.
__device__ inline unsigned rank_of(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 1;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// -inf, which has no part in a softmax, where there is no expert.
template <class T, int PER>
__device__ inline void load_logits(const Route& p, int64 token, float (&x)[PER]) {
  const float nothing = __uint_as_float(0xff800000u);
  const T* const row = static_cast<const T*>(p.logits) + token * p.row;
#pragma unroll
  for (int m = 0; m < PER; ++m) x[m] = lane() + 32 * m < p.num_experts ? widen(row[lane() + 32 * m]) : nothing;
}

// x becomes e^{x - max}, all of it NaN where none is finite.
template <int PER>
__device__ inline void exponentials(float (&x)[PER]) {
  float top = x[0];
#pragma unroll
  for (int m = 1; m < PER; ++m) top = fmaxf(top, x[m]);
  top = max_of_warp(top);
#pragma unroll
  for (int m = 0; m < PER; ++m) x[m] = expf(x[m] - top);
}

template <class T, int PER>
__device__ inline void route_forward(const Route& p, int64 token) {
  float x[PER];
  unsigned rank[PER];  // 0: taken, or no expert
  int place[PER];      // among the chosen; -1: not chosen
  load_logits<T>(p, token, x);
#pragma unroll
  for (int m = 0; m < PER; ++m) {
    rank[m] = lane() + 32 * m < p.num_experts ? rank_of(x[m]) : 0;
    place[m] = -1;
  }
  for (int j = 0; j < p.top_k; ++j) {
    unsigned best = rank[0];
    int at = 0;
#pragma unroll
    for (int m = 1; m < PER; ++m)
      if (rank[m] > best) {
        best = rank[m];
        at = m;
      }
    const unsigned largest = __reduce_max_sync(kAll, best);
    const unsigned chosen = __reduce_min_sync(kAll, best == largest ? unsigned(lane() + 32 * at) : kAll);
#pragma unroll
    for (int m = 0; m < PER; ++m)
      if (chosen == unsigned(lane() + 32 * m)) {
        rank[m] = 0;
        place[m] = j;
      }
  }
  exponentials(x);
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < PER; ++m)  // a NaN among the logits is not hidden, chosen or not
    if (!p.renormalize || place[m] >= 0 || x[m] != x[m]) sum += x[m];
  sum = sum_of_warp(sum);
#pragma unroll
  for (int m = 0; m < PER; ++m)
    if (place[m] >= 0) {
      p.weights[token * p.top_k + place[m]] = x[m] / sum;
      p.experts[token * p.top_k + place[m]] = lane() + 32 * m;
    }
}

// dl_j = w_j (dw_j - mean) for the chosen, mean = sum_i w_i dw_i, and -softmax_j mean for others, if they had a part.
template <class T, int PER>
__device__ inline void route_backward(const Route& p, int64 token) {
  const float* const weights = p.weights + token * p.top_k;
  const float* const dweights = p.dweights + token * p.dweights_row;
  float mean = 0.0f;
  for (int64 j = lane(); j < p.top_k; j += 32) mean = fmaf(weights[j], dweights[j], mean);
  mean = sum_of_warp(mean);

  float x[PER];
  if (p.renormalize) {
#pragma unroll
    for (int m = 0; m < PER; ++m) x[m] = 0.0f;
  } else {
    load_logits<T>(p, token, x);
    exponentials(x);
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < PER; ++m) sum += x[m];
    sum = sum_of_warp(sum);
#pragma unroll
    for (int m = 0; m < PER; ++m) x[m] *= -mean / sum;
  }
  for (int64 first = 0; first < p.top_k; first += 32) {
    const int64 j = first + lane();
    const int own = j < p.top_k ? p.experts[token * p.top_k + j] : -1;
    const float own_dl = j < p.top_k ? weights[j] * (dweights[j] - mean) : 0.0f;
    for (int from = 0; from < 32 && first + from < p.top_k; ++from) {
      const int expert = __shfl_sync(kAll, own, from);
      const float dl = __shfl_sync(kAll, own_dl, from);
#pragma unroll
      for (int m = 0; m < PER; ++m)
        if (expert == lane() + 32 * m) x[m] = dl;
    }
  }
  T* const row = static_cast<T*>(p.dlogits) + token * p.num_experts;
#pragma unroll
  for (int m = 0; m < PER; ++m)
    if (lane() + 32 * m < p.num_experts) narrow(x[m], row[lane() + 32 * m]);
}

// A warp for each token, one after the other if there are more than a grid may have.
template <void (*ROUTE)(const Route&, int64)>
__device__ inline void tokens(const Route& p, float*) {
  for (int64 token = int64(blockIdx.x) * kWarps + warp(); token < p.tokens; token += int64(gridDim.x) * kWarps)
    ROUTE(p, token);
}

#define ROUTE(WAY, T, PER) KERNEL(route_##WAY##_##T##_##PER, Route, 2, float, (tokens<route_##WAY<T, PER>>))

#ifdef LIGHTNING_KERNEL  // one kernel only, for NVRTC: ROUTE with its arguments
LIGHTNING_KERNEL
#else
#define ROUTES(WAY, T) \
  ROUTE(WAY, T, 1)     \
  ROUTE(WAY, T, 2)     \
  ROUTE(WAY, T, 4)     \
  ROUTE(WAY, T, 8)     \
  ROUTE(WAY, T, 16)
ROUTES(forward, float32)
ROUTES(forward, bfloat16)
ROUTES(forward, float16)
ROUTES(backward, float32)
ROUTES(backward, bfloat16)
ROUTES(backward, float16)
#endif
