// The experts' feed-forward of (token, choice) pairs: only slots that were hit are read, and only routed rows computed.
#pragma once

#include "dense.h"

namespace moe {

inline void swiglu(const float* gate_up, int64_t inner, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= inner; i += kLanes) {
    const vf gate = load(gate_up + i);
    store(y + i, gate / (1.0f + exp(-gate)) * load(gate_up + inner + i));
  }
  for (; i < inner; ++i) y[i] = gate_up[i] / (1.0f + exp(-gate_up[i])) * gate_up[inner + i];
}

// x [m, hidden], slot [m, choices] of `slots`, or outside of them for none; gate_up [slots, hidden, 2 inner],
// down [slots, inner, hidden]; y [m, choices, hidden], zeros where there is no slot.
template <class X, class W>
void expert_ffn(Pool& pool, const X* x, const int32_t* slot, int64_t m, int64_t choices, int64_t hidden,
                const W* gate_up, const W* down, int64_t slots, int64_t inner, X* y) {
  constexpr int64_t kRows = 32;  // of a part; in prefill one slot's rows keep several threads busy
  struct Part {
    int64_t slot, first, count;
  };
  const int64_t pairs = m * choices;
  std::vector<int64_t> begin(slots + 1), order(pairs);
  for (int64_t i = 0; i < pairs; ++i)
    if (0 <= slot[i] && slot[i] < slots) ++begin[slot[i] + 1];
  for (int64_t s = 0; s < slots; ++s) begin[s + 1] += begin[s];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    if (0 <= slot[i] && slot[i] < slots)
      order[next[slot[i]]++] = i;
    else
      std::memset(static_cast<void*>(y + i * hidden), 0, hidden * sizeof(X));
  }
  std::vector<Part> parts;
  for (int64_t s = 0; s < slots; ++s)
    for (int64_t i = begin[s]; i < begin[s + 1]; i += kRows) parts.push_back({s, i, std::min(kRows, begin[s + 1] - i)});
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.count > b.count; });

  pool.run(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part part = parts[i];
    float* rows = scratch(1, kRows * hidden);
    float* wide = scratch(2, kRows * 2 * inner);
    float* act = scratch(3, kRows * inner);
    for (int64_t r = 0; r < part.count; ++r)
      widen_row(x + order[part.first + r] / choices * hidden, hidden, rows + r * hidden);
    matmul(rows, hidden, part.count, gate_up + part.slot * hidden * 2 * inner, 2 * inner, hidden, 2 * inner, wide,
           2 * inner);
    for (int64_t r = 0; r < part.count; ++r) swiglu(wide + r * 2 * inner, inner, act + r * inner);
    matmul(act, inner, part.count, down + part.slot * inner * hidden, hidden, inner, hidden, rows, hidden);
    for (int64_t r = 0; r < part.count; ++r) narrow_row(rows + r * hidden, hidden, y + order[part.first + r] * hidden);
  });
}

}  // namespace moe
