// A pass over the tokens in one direction of time, carrying a state; and the division of passes among threads.
#pragma once

#include "block.h"
#include "runtime.h"

namespace lightning {
namespace LIGHTNING_ISA {

template <class Acc>
class Sweep {
 public:
  // A state is [rows, cols]; `reverse` starts at the last token.
  Sweep(const AttentionShape& shape, int64_t state_rows, int64_t state_cols, bool reverse)
      : shape(shape), state_rows(state_rows), state_cols(state_cols), reverse(reverse) {}
  virtual ~Sweep() = default;

  // Carries `state` over one segment of one head, and writes the outputs if they are wanted. Without `carry` the
  // caller does not need the state that the segment leaves.
  virtual void run(const Segment& segment, int64_t head, const Matrix<Acc>& state, Arena& arena, bool outputs,
                   bool carry) const = 0;
  // The state before the sequence's first token of the sweep; `state` comes zeroed.
  virtual void load_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const = 0;
  virtual bool wants_outputs() const { return true; }
  virtual bool wants_final_state() const = 0;
  virtual void store_state(int64_t sequence, int64_t head, const Matrix<Acc>& state) const = 0;
  // Takes the memory of `run` from an arena that only counts.
  virtual void reserve(Arena& arena) const = 0;

  Matrix<Acc> state_matrix(Arena& arena) const { return arena.matrix<Acc>(padded(state_rows), padded(state_cols)); }
  int64_t state_size() const {
    Arena counter(nullptr);
    state_matrix(counter);
    return int64_t(counter.used() / sizeof(Acc));
  }
  bool starts(const Segment& s) const { return reverse ? s.last : s.first; }
  bool ends(const Segment& s) const { return reverse ? s.first : s.last; }

  const AttentionShape& shape;
  const int64_t state_rows, state_cols;
  const bool reverse;
};

// Runs all passes over all sequences and heads.
//
// A sequence that is cut into segments takes two rounds: in the first each segment leaves its end state E from zero;
// a scan in closed form, S_in <- lambda^L S_in + E, gives the state that enters each; the second is the pass itself. Where
// no outputs are wanted the scan goes on through the last segment, and there is no second round.
template <class Acc, int Passes>
void run_sweeps(const Sweep<Acc>* const (&sweeps)[Passes]) {
  const AttentionShape& shape = sweeps[0]->shape;
  const Schedule schedule(shape);
  const int64_t segments = schedule.size(), heads = shape.heads;

  size_t scratch = 0;
  for (const auto* sweep : sweeps) {
    Arena counter(nullptr);
    sweep->state_matrix(counter);
    sweep->reserve(counter);
    scratch = counter.used() > scratch ? counter.used() : scratch;
  }

  // Entering states of the segments of cut sequences; pass by pass, segment by segment, head by head.
  int64_t pass_size[Passes], offset[Passes], total = 0;
  for (int pass = 0; pass < Passes; ++pass) {
    pass_size[pass] = sweeps[pass]->state_size();
    offset[pass] = total;
    total += pass_size[pass] * schedule.cut() * heads;
  }
  const Buffer entering(size_t(total) * sizeof(Acc));
  const auto entering_state = [&](int64_t pass, const Segment& segment, int64_t head) {
    return static_cast<Acc*>(entering.data()) + offset[pass] + (segment.cut * heads + head) * pass_size[pass];
  };

  if (schedule.cut() > 0) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(schedule.threads())
    for (int64_t task = 0; task < Passes * segments * heads; ++task) {
      const int64_t pass = task / (segments * heads), head = schedule.head(task % heads);
      const Segment& segment = schedule[task / heads % segments];
      const Sweep<Acc>& sweep = *sweeps[pass];
      if (segment.cut < 0 || (sweep.ends(segment) && sweep.wants_outputs())) continue;
      Arena arena(thread_scratch(scratch));
      Matrix<Acc> state = sweep.state_matrix(arena);
      std::memset(state.data, 0, size_t(pass_size[pass]) * sizeof(Acc));
      sweep.run(segment, head, state, arena, /*outputs=*/false, /*carry=*/true);
      std::memcpy(entering_state(pass, segment, head), state.data, size_t(pass_size[pass]) * sizeof(Acc));
    }
#pragma omp parallel for schedule(static) num_threads(schedule.threads())
    for (int64_t task = 0; task < Passes * heads; ++task) {
      const int64_t pass = task / heads, head = task % heads, size = pass_size[pass];
      const Sweep<Acc>& sweep = *sweeps[pass];
      Arena arena(thread_scratch(scratch));
      Matrix<Acc> state = sweep.state_matrix(arena);
      for (int64_t step = 0; step < segments; ++step) {
        const Segment& segment = schedule[sweep.reverse ? segments - 1 - step : step];
        if (segment.cut < 0) continue;
        if (sweep.starts(segment)) {
          std::memset(state.data, 0, size_t(size) * sizeof(Acc));
          sweep.load_state(segment.sequence, head, state);
        }
        const Acc factor = Acc(std::exp(-double(shape.decay[head]) * double(segment.length)));
        Acc* end = entering_state(pass, segment, head);
        const bool go_on = !sweep.ends(segment) || !sweep.wants_outputs();
        for (int64_t x = 0; x < size; ++x) {
          const Acc in = state.data[x];
          if (go_on) state.data[x] = factor * in + end[x];
          end[x] = in;
        }
        if (!sweep.wants_outputs() && sweep.ends(segment)) sweep.store_state(segment.sequence, head, state);
      }
    }
  }

#pragma omp parallel for schedule(dynamic, 1) num_threads(schedule.threads())
  for (int64_t task = 0; task < Passes * segments * heads; ++task) {
    const int64_t pass = task / (segments * heads), head = schedule.head(task % heads);
    const Segment& segment = schedule[task / heads % segments];
    const Sweep<Acc>& sweep = *sweeps[pass];
    if (segment.cut >= 0 && !sweep.wants_outputs()) continue;
    Arena arena(thread_scratch(scratch));
    Matrix<Acc> state = sweep.state_matrix(arena);
    if (segment.cut >= 0) {
      std::memcpy(state.data, entering_state(pass, segment, head), size_t(pass_size[pass]) * sizeof(Acc));
    } else {
      std::memset(state.data, 0, size_t(pass_size[pass]) * sizeof(Acc));
      sweep.load_state(segment.sequence, head, state);
    }
    const bool carry = sweep.ends(segment) && sweep.wants_final_state();
    sweep.run(segment, head, state, arena, sweep.wants_outputs(), carry);
    if (carry) sweep.store_state(segment.sequence, head, state);
  }
}

// One head of an operand, from the segment's first token in the direction of the sweep.
template <class T>
Rows<T> rows_of(const Operand& x, const Segment& segment, int64_t head, int64_t dim, bool reverse) {
  const int64_t token = reverse ? segment.begin + segment.length - 1 : segment.begin;
  return {static_cast<T*>(x.data) + segment.batch * x.batch + token * x.token + head * x.head,
          reverse ? -x.token : x.token, segment.length, dim};
}

template <class Acc>
Acc* state_of(const State& s, int64_t row, int64_t head) {
  return static_cast<Acc*>(s.data) + row * s.row + head * s.head;
}

}  // namespace LIGHTNING_ISA
}  // namespace lightning
