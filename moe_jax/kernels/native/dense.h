// Dense products of a step's rows, with the normalisation before and the addition after them.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"
#include "vec.h"

namespace moe {

// Memory of this thread for the length of an operation. `which` tells what lives at the same time apart.
inline float* scratch(int which, int64_t count) {
  thread_local std::vector<float> memory[4];
  if (static_cast<int64_t>(memory[which].size()) < count) memory[which].resize(count);
  return memory[which].data();
}

// The nearest value of type X.
template <class X>
inline float rounded(float x) {
  X y;
  narrow(x, &y);
  return widen(y);
}

template <class X>
void widen_row(const X* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = widen(x[i]);
}

template <class X>
void narrow_row(const float* x, int64_t n, X* y) {
  for (int64_t i = 0; i < n; ++i) narrow(x[i], y + i);
}

inline float dot(const float* x, const float* y, int64_t n) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int c = 0; c < 4; ++c) acc[c] += load(x + i + c * kLanes) * load(y + i + c * kLanes);
  for (; i < n; i += kLanes) {
    const int left = static_cast<int>(std::min<int64_t>(kLanes, n - i));
    acc[0] += load(x + i, left) * load(y + i, left);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Root mean square normalisation (Zhang and Sennrich 2019) of a row in place. X: the type that results are rounded to.
template <class X>
void rms_norm(float* x, const X* weight, int64_t n, float eps) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] = rounded<X>(rounded<X>(x[i] * scale) * widen(weight[i]));
}

// rows [m, k] as floats, normalised if there is a weight: x itself if nothing is to be done to it.
template <class X>
const float* prepare_rows(const X* x, int64_t m, int64_t k, const X* norm, float eps) {
  if (std::is_same_v<X, float> && norm == nullptr) return reinterpret_cast<const float*>(x);
  float* out = scratch(0, m * k);
  for (int64_t i = 0; i < m; ++i) {
    widen_row(x + i * k, k, out + i * k);
    if (norm != nullptr) rms_norm(out + i * k, norm, k, eps);
  }
  return out;
}

// y[m, b, n] = rms_norm(x[m, b, k]) @ w[b, k, n] + bias[n] + residual[m, n] for each b of the batch. Norm, bias and
// residual may be null, and must be if the batch is more than 1.
template <class X, class W, class Y>
void dense(Pool& pool, const X* x, int64_t m, int64_t batch, int64_t k, const W* w, int64_t n, const X* norm, float eps,
           const X* bias, const X* residual, Y* y) {
  constexpr int64_t kRows = 64, kColumns = 3 * kLanes;  // of a part: small enough to share out
  const float* input = prepare_rows(x, m, batch * k, norm, eps);
  const int64_t columns = (n + kColumns - 1) / kColumns, tiles = (m + kRows - 1) / kRows;
  pool.run(batch * columns * tiles, [&](int64_t task) {
    const int64_t i = task % tiles * kRows, j = task / tiles % columns * kColumns, b = task / tiles / columns;
    const int64_t height = std::min(kRows, m - i), width = std::min(kColumns, n - j), ldy = batch * n;
    const bool direct = std::is_same_v<Y, float> && bias == nullptr && residual == nullptr;
    float* out = direct ? reinterpret_cast<float*>(y) + i * ldy + b * n + j : scratch(1, kRows * kColumns);
    const int64_t ld = direct ? ldy : kColumns;
    matmul(input + (i * batch + b) * k, batch * k, height, w + b * k * n + j, n, k, width, out, ld);
    if (direct) return;
    for (int64_t r = 0; r < height; ++r) {
      float* row = out + r * ld;
      const int64_t at = (i + r) * ldy + b * n + j;
      if (bias != nullptr)
        for (int64_t c = 0; c < width; ++c) row[c] += widen(bias[j + c]);
      if (residual != nullptr)
        for (int64_t c = 0; c < width; ++c) row[c] += widen(residual[at + c]);
      narrow_row(row, width, y + at);
    }
  });
}

}  // namespace moe
