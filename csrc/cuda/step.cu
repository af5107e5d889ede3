// New tokens against a stored state, which is read once and written once for all of them:
//
//   S <- lambda S + k_t v_t^T        o_t = scale * S^T q_t        for each token t in turn, lambda = e^{-s}
//
// The state's traffic is the time: 128 KiB a head and call at K = V = 128 in float32, beside 1 KiB of the rest. A block
// keeps kLanes * 16 bytes of columns of one head's state in registers, all rows of them: a thread holds 16 bytes of every
// kRowThreads-th row, asks for all of them before it uses one, and eight threads ask for 128 bytes of a row. Blocks are
// small, so that several heads are in flight on a multiprocessor, and one sequence of 64 heads still occupies all of them.
//
// One source for nvcc (ahead of time) and NVRTC (at first use), behind prelude.cuh. Offsets are 64-bit.

// One [B, T, H, D] operand whose last dimension is dense; strides count elements.
struct Operand {
  void* data;
  int64 batch, token, head;
};

struct Decode {
  Operand q, k, v, o;
  const float* decay;  // [H], the rate s >= 0
  void* state;         // [S, H, K, V], of which [K, V] is dense
  int64 state_row, state_head, state_rows;
  const void* slots;  // [B], a row of the state; others are padding. Null: row b
  int64 slot_bytes;   // 4 or 8
  int64 batch, tokens, heads, key_dim, value_dim;
  double scale;
};

constexpr int kLanes = 8;                       // threads along a row of the state
constexpr int kRowThreads = kThreads / kLanes;  // and along a column
constexpr int kTokens = 8;                      // whose sums wait for each other at a time

// What a thread reads or writes of the state at once: 16 bytes, or as much element by element.
template <class S>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(S);
  S at[size];
};

template <class T>
__device__ inline T* head_of(const Operand& x, int64 batch, int64 head) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

// The first `count` elements at `from`, the rest zero; all of them, in one access, where they are ALIGNED.
template <bool ALIGNED, class S>
__device__ inline void load(float* to, const S* from, int count) {
  Vector<S> x{};
  if (ALIGNED) {
    if (count > 0) x = *reinterpret_cast<const Vector<S>*>(from);
  } else {
#pragma unroll
    for (int c = 0; c < Vector<S>::size; ++c)
      if (c < count) x.at[c] = from[c];
  }
#pragma unroll
  for (int c = 0; c < Vector<S>::size; ++c) to[c] = widen(x.at[c]);
}

template <bool ALIGNED, class S>
__device__ inline void store(S* to, const float* from, int count) {
  Vector<S> x;
#pragma unroll
  for (int c = 0; c < Vector<S>::size; ++c) narrow(from[c], x.at[c]);
  if (ALIGNED) {
    if (count > 0) *reinterpret_cast<Vector<S>*>(to) = x;
  } else {
#pragma unroll
    for (int c = 0; c < Vector<S>::size; ++c)
      if (c < count) to[c] = x.at[c];
  }
}

// The row of the state that belongs to row `batch` of the inputs.
__device__ inline int64 slot_of(const Decode& p, int64 batch) {
  if (!p.slots) return batch;
  return p.slot_bytes == 8 ? static_cast<const int64*>(p.slots)[batch] : static_cast<const int*>(p.slots)[batch];
}

// Columns `tile` of one head, for inputs of type T: ROWS is at least K / kRowThreads. `partial` is [kTokens, kWarps, width].
template <class T, class S, int ROWS, bool ALIGNED>
__device__ inline void step(const Decode& p, int64 batch, int64 head, int tile, float* partial) {
  constexpr int kColumns = Vector<S>::size, kWidth = kLanes * kColumns;
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  const int key_dim = int(p.key_dim), value_dim = int(p.value_dim);
  const int first_column = tile * kWidth, column = first_column + lane * kColumns;
  const int columns = value_dim - column;  // of this thread that exist, if less than kColumns
  const T* q = head_of<const T>(p.q, batch, head);
  const T* k = head_of<const T>(p.k, batch, head);
  const T* v = head_of<const T>(p.v, batch, head) + column;
  T* o = head_of<T>(p.o, batch, head) + first_column;
  const int64 slot = slot_of(p, batch);
  const bool live = slot >= 0 && slot < p.state_rows;
  if (!live) {  // padding: its output is zero, and no state is its own
    for (int64 t = 0; t < p.tokens; ++t)
      if (int(threadIdx.x) < kWidth && first_column + int(threadIdx.x) < value_dim)
        narrow(0.0f, o[t * p.o.token + threadIdx.x]);
    return;
  }

  S* const state = static_cast<S*>(p.state) + slot * p.state_row + head * p.state_head + column;
  float s[ROWS][kColumns];
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    const int i = m * kRowThreads + row;
    load<ALIGNED>(s[m], state + int64(i) * value_dim, i < key_dim ? columns : 0);
  }

  // lambda as kept + loss, one of them exact: the float32 nearest to a slow lambda would be off by the same at every token
  // ever decoded, and 1 + loss for a fast one would leave behind what the loss of a large state is off by.
  const float rate = p.decay[head];
  const bool slow = rate < 0.25f;
  const float kept = slow ? 1.0f : expf(-rate), loss = slow ? expm1f(-rate) : 0.0f;
  for (int64 first = 0; first < p.tokens; first += kTokens) {
    const int tokens = int(p.tokens - first < kTokens ? p.tokens - first : kTokens);
    for (int t = 0; t < tokens; ++t) {
      const T* const qt = q + (first + t) * p.q.token;
      const T* const kt = k + (first + t) * p.k.token;
      const T* const vt = v + (first + t) * p.v.token;
      float vs[kColumns], sum[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        vs[c] = c < columns ? widen(vt[c]) : 0.0f;
        sum[c] = 0.0f;
      }
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const int i = m * kRowThreads + row;
        if (i < key_dim) {
          const float qi = widen(qt[i]), ki = widen(kt[i]);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            s[m][c] = fmaf(s[m][c], kept, fmaf(s[m][c], loss, ki * vs[c]));
            sum[c] = fmaf(qi, s[m][c], sum[c]);
          }
        }
      }
      // Over the rows of a warp; those of the warps are summed below, always in the same order.
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int distance = kLanes; distance < 32; distance *= 2)
          sum[c] += __shfl_xor_sync(kAll, sum[c], distance);
        if (threadIdx.x % 32 < kLanes) partial[(t * kWarps + threadIdx.x / 32) * kWidth + lane * kColumns + c] = sum[c];
      }
    }
    if (first + tokens == p.tokens) {
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        const int i = m * kRowThreads + row;
        store<ALIGNED>(state + int64(i) * value_dim, s[m], i < key_dim ? columns : 0);
      }
    }
    __syncthreads();
    for (int x = threadIdx.x; x < tokens * kWidth; x += kThreads) {
      const int t = x / kWidth, c = x % kWidth;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[(t * kWarps + warp) * kWidth + c];
      if (first_column + c < value_dim) narrow(float(p.scale) * sum, o[(first + t) * p.o.token + c]);
    }
    __syncthreads();  // before the sums are overwritten
  }
}

// A block for each tile of each head, one after the other if there are more than a grid may have.
template <class T, class S, int ROWS, bool ALIGNED>
__device__ inline void steps(const Decode& p, float* partial) {
  constexpr int kWidth = kLanes * Vector<S>::size;
  const int64 tiles = (p.value_dim + kWidth - 1) / kWidth;
  const int64 programs = p.batch * p.heads * tiles;
  for (int64 program = blockIdx.x; program < programs; program += gridDim.x)
    step<T, S, ROWS, ALIGNED>(p, program / tiles / p.heads, program / tiles % p.heads, int(program % tiles), partial);
}

// Blocks that a multiprocessor should hold: registers for the state and 48 to 64 more a thread.
template <int FLOATS>
constexpr int kBlocks = FLOATS <= 8 ? 4 : FLOATS <= 16 ? 3 : 2;

#define STEP(T, S, ROWS, ACCESS, ALIGNED)                                                              \
  KERNEL(step_##T##_##S##_##ROWS##_##ACCESS, Decode, (kBlocks<ROWS * Vector<S>::size>), float,         \
         steps<T, S, ROWS, ALIGNED>)

#ifdef LIGHTNING_KERNEL  // one kernel only, for NVRTC: STEP with its arguments
LIGHTNING_KERNEL
#else
#define STEP_ROWS(T, S)         \
  STEP(T, S, 1, aligned, true)  \
  STEP(T, S, 2, aligned, true)  \
  STEP(T, S, 4, aligned, true)  \
  STEP(T, S, 8, aligned, true)  \
  STEP(T, S, 8, any, false)
STEP_ROWS(float32, float32)
STEP_ROWS(float32, bfloat16)
STEP_ROWS(bfloat16, float32)
STEP_ROWS(bfloat16, bfloat16)
STEP_ROWS(float16, float32)
STEP_ROWS(float16, bfloat16)
#endif
