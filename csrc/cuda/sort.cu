// Pairs of tokens and experts by expert: where each stands, which stands where, and where each expert's end. Stable.
//
// Pairs are counted, not compared: a warp counts 32 of them at a time, a block has a chunk of kChunk, and chunks meet
// in a table that is summed in between. Up to kChunk pairs take one launch, as launches are the time then. No sum
// depends on which thread is first, and none is made by atomics.
//
// One source for nvcc (ahead of time) and NVRTC (at first use), behind prelude.cuh. Offsets are 64-bit.

struct Sort {
  const int* experts;  // [M]; those outside [0, E) are nobody's
  int* order;          // [M]
  int* position;       // [M]
  int* offs;           // [E]
  int* counts;         // [E, chunks + 1] if there are several: of a chunk, later of those before it; last, of all
  int64 pairs, num_experts, chunks;
};

constexpr int kChunk = 4096;
constexpr int kRounds = kChunk / kThreads;  // a thread's pairs of a chunk: every 32nd of its warp's
constexpr int kOwn = 2;                     // a thread's experts: consecutive ones

// The sum of x over the threads before this one; `all` gets that of all of them. `sums` is [kWarps].
__device__ inline int sum_before(int x, int* sums, int& all) {
  int upto = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAll, upto, distance);
    if (lane() >= distance) upto += before;
  }
  if (lane() == 31) sums[warp()] = upto;
  __syncthreads();
  int before = 0;
  all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) before += sums[w];
    all += sums[w];
  }
  __syncthreads();  // before the sums are overwritten
  return before + upto - x;
}

// Of this thread in round `round`. A warp's pairs are consecutive, and it has as few rounds as the chunk allows.
struct Pairs {
  int64 first, end;
  int rounds;
  __device__ inline Pairs(const Sort& p, int64 chunk) {
    const int64 left = p.pairs - chunk * kChunk;
    const int count = int(left < kChunk ? left : kChunk);
    rounds = (count + kThreads - 1) / kThreads;
    first = chunk * kChunk + int64(warp()) * rounds * 32 + lane();
    end = chunk * kChunk + count;
  }
  __device__ inline int64 at(int round) const { return first + round * 32; }
  __device__ inline bool has(int round) const { return round < rounds && at(round) < end; }
};

// The thread's experts (-1: none), and how many pairs of its warp before each have the same. `counts` [kWarps, E] gets
// the pairs of each warp.
__device__ inline void rank_pairs(const Sort& p, const Pairs& pairs, int* counts, int (&expert)[kRounds],
                                  int (&rank)[kRounds]) {
  const int num_experts = int(p.num_experts);
  int* const own = counts + warp() * num_experts;
  for (int e = lane(); e < num_experts; e += 32) own[e] = 0;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int e = pairs.has(r) ? p.experts[pairs.at(r)] : -1;
    expert[r] = e >= 0 && e < num_experts ? e : -1;
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r < pairs.rounds) {
      const unsigned same = __match_any_sync(kAll, expert[r]);
      const int leader = __ffs(int(same)) - 1;
      int before = 0;
      if (lane() == leader && expert[r] >= 0) {
        before = own[expert[r]];
        own[expert[r]] = before + __popc(same);
      }
      rank[r] = __shfl_sync(kAll, before, leader) + __popc(same & ((1u << lane()) - 1));
      __syncwarp();  // another lane may lead the next
    }
  }
  __syncthreads();
}

// Turns each warp's pairs of one expert, E apart in `counts`, into those of the warps before it -> of all.
__device__ inline int sum_warps(int* counts, int64 num_experts) {
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int count = counts[w * num_experts];
    counts[w * num_experts] = sum;
    sum += count;
  }
  return sum;
}

__device__ inline void place_pair(const Sort& p, int64 pair, int place) {
  p.position[pair] = place;
  if (place >= 0) p.order[place] = int(pair);
}

// All of it, for one chunk.
__device__ inline void one_chunk(const Sort& p, int* counts) {
  int expert[kRounds], rank[kRounds], count[kOwn], all;
  const int64 E = p.num_experts, e = kOwn * threadIdx.x;
  const Pairs pairs(p, 0);
  rank_pairs(p, pairs, counts, expert, rank);
  for (int c = 0; c < kOwn; ++c) count[c] = e + c < E ? sum_warps(counts + e + c, E) : 0;
  int end = sum_before(count[0] + count[1], counts + kWarps * E, all);
  for (int c = 0; c < kOwn; ++c)
    if (e + c < E) {
      for (int w = 0; w < kWarps; ++w) counts[w * E + e + c] += end;
      end += count[c];
      p.offs[e + c] = end;
    }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    if (pairs.has(r)) place_pair(p, pairs.at(r), expert[r] < 0 ? -1 : counts[warp() * E + expert[r]] + rank[r]);
}

// First launch for several chunks, a block for each: a pair's position is how many of its chunk are before it.
__device__ inline void count_chunk(const Sort& p, int* counts) {
  int expert[kRounds], rank[kRounds];
  const int64 E = p.num_experts, chunk = blockIdx.x;
  const Pairs pairs(p, chunk);
  rank_pairs(p, pairs, counts, expert, rank);
  for (int64 e = threadIdx.x; e < E; e += kThreads) p.counts[e * (p.chunks + 1) + chunk] = sum_warps(counts + e, E);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r)
    if (pairs.has(r)) p.position[pairs.at(r)] = expert[r] < 0 ? -1 : counts[warp() * E + expert[r]] + rank[r];
}

// Second, a block for each expert: its pairs in the chunks before each.
__device__ inline void sum_chunks(const Sort& p, int* sums) {
  int* const counts = p.counts + blockIdx.x * (p.chunks + 1);
  int before = 0, all;
  for (int64 first = 0; first < p.chunks; first += kThreads) {
    const int64 chunk = first + threadIdx.x;
    const int sum = sum_before(chunk < p.chunks ? counts[chunk] : 0, sums, all);
    if (chunk < p.chunks) counts[chunk] = before + sum;
    before += all;
  }
  if (threadIdx.x == 0) counts[p.chunks] = before;
}

// Third, a block for each chunk: positions among all pairs.
__device__ inline void place_chunk(const Sort& p, int* starts) {
  const int64 E = p.num_experts, e = kOwn * threadIdx.x, chunk = blockIdx.x;
  const int* const counts = p.counts + e * (p.chunks + 1);
  int count[kOwn], all;
  for (int c = 0; c < kOwn; ++c) count[c] = e + c < E ? counts[c * (p.chunks + 1) + p.chunks] : 0;
  int end = sum_before(count[0] + count[1], starts + E, all);
  for (int c = 0; c < kOwn; ++c)
    if (e + c < E) {
      starts[e + c] = end + counts[c * (p.chunks + 1) + chunk];
      end += count[c];
      if (chunk == 0) p.offs[e + c] = end;
    }
  __syncthreads();
  for (int64 pair = chunk * kChunk + threadIdx.x; pair < p.pairs && pair < (chunk + 1) * kChunk; pair += kThreads)
    if (p.position[pair] >= 0) place_pair(p, pair, starts[p.experts[pair]] + p.position[pair]);
}

#define SORT(WAY) KERNEL(sort_##WAY, Sort, 2, int, WAY)

#ifdef LIGHTNING_KERNEL  // one kernel only, for NVRTC: SORT with its argument
LIGHTNING_KERNEL
#else
SORT(one_chunk)
SORT(count_chunk)
SORT(sum_chunks)
SORT(place_chunk)
#endif
