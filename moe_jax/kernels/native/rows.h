// What is done to each row by itself, between the products.
#pragma once

#include <limits>

#include "dense.h"

namespace moe {

// The columns of a grouped-query projection.
struct Heads {
  int64_t queries, keys, dim;  // heads of queries, of keys and of values, numbers in each
  int64_t norm;                // of queries and keys: 0 none, 1 of each head, 2 of all heads together
  float eps, clip;             // clip 0: none
  float scale;                 // of queries
  bool interleaved;            // pairs are (0, 1), (2, 3), ...; they come out de-interleaved
};

// Rotary embedding of a head's numbers (Su et al. 2021), to the type they had.
template <class X>
void rotate(const float* x, const float* cos, const float* sin, int64_t dim, bool interleaved, float scale, X* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = interleaved ? x[2 * i] : x[i], b = interleaved ? x[2 * i + 1] : x[half + i];
    narrow(rounded<X>(a * cos[i] - b * sin[i]) * scale, y + i);
    narrow(rounded<X>(b * cos[i] + a * sin[i]) * scale, y + half + i);
  }
}

// Rows [m, (queries + 2 keys) dim] of queries, keys and values side by side as q, k and v, normalised and rotated by
// cos and sin [m, dim / 2].
template <class X>
void split_heads(Pool& pool, const X* x, int64_t m, const Heads& h, const X* q_norm, const X* k_norm, const float* cos,
                 const float* sin, X* q, X* k, X* v) {
  constexpr int64_t kRows = 8;
  const int64_t qs = h.queries * h.dim, ks = h.keys * h.dim, width = qs + 2 * ks;
  pool.run((m + kRows - 1) / kRows, [&](int64_t task) {
    float* row = scratch(1, width);
    for (int64_t i = task * kRows; i < std::min(m, (task + 1) * kRows); ++i) {
      widen_row(x + i * width, width, row);
      if (h.norm == 2) rms_norm(row, q_norm, qs, h.eps), rms_norm(row + qs, k_norm, ks, h.eps);
      if (h.clip > 0)
        for (int64_t j = 0; j < width; ++j) row[j] = std::clamp(row[j], -h.clip, h.clip);
      for (int64_t n = 0; n < h.queries + h.keys; ++n) {
        const bool query = n < h.queries;
        float* head = row + n * h.dim;
        if (h.norm == 1) rms_norm(head, query ? q_norm : k_norm, h.dim, h.eps);
        X* out = query ? q + i * qs + n * h.dim : k + i * ks + (n - h.queries) * h.dim;
        rotate(head, cos + i * h.dim / 2, sin + i * h.dim / 2, h.dim, h.interleaved, query ? h.scale : 1.0f, out);
      }
      narrow_row(row + qs + ks, ks, v + i * ks);
    }
  });
}

// How experts are chosen; DeepSeek-V2 section 2.2.1 and DeepSeek-V3 section 2.1.2 for groups.
struct Router {
  int64_t experts, choices, groups, top_groups;
  bool sigmoid, best_two, normalize;  // best_two: a group's score is the sum of its two best, else its best
  float scale;
};

// The n greatest of x [count], greatest first and the lower of equals first; x loses them.
inline void top(float* x, int64_t count, int64_t n, int32_t* ids) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t best = 0;
    for (int64_t j = 1; j < count; ++j)
      if (x[j] > x[best]) best = j;
    ids[i] = static_cast<int32_t>(best);
    x[best] = -std::numeric_limits<float>::infinity();
  }
}

// A row's logits [experts] become its scores; `free` has room for 2 experts + 2 groups.
inline void choose(float* logits, const float* bias, const Router& r, float* free, int32_t* ids, float* weights) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  const int64_t n = r.experts, size = n / r.groups;
  if (r.sigmoid) {
    for (int64_t j = 0; j < n; ++j) logits[j] = 1.0f / (1.0f + exp(-logits[j]));
  } else {
    const float best = *std::max_element(logits, logits + n);
    float total = 0;
    for (int64_t j = 0; j < n; ++j) total += logits[j] = exp(logits[j] - best);
    for (int64_t j = 0; j < n; ++j) logits[j] /= total;
  }
  float *choice = free, *rest = free + n, *group = free + 2 * n;
  for (int64_t j = 0; j < n; ++j) choice[j] = bias ? logits[j] + bias[j] : logits[j];
  if (r.groups > 1) {
    auto* chosen = reinterpret_cast<int32_t*>(group + r.groups);
    std::copy_n(choice, n, rest);
    for (int64_t g = 0; g < r.groups; ++g) {
      int32_t two[2];
      top(rest + g * size, size, r.best_two ? 2 : 1, two);
      group[g] = choice[g * size + two[0]] + (r.best_two ? choice[g * size + two[1]] : 0.0f);
    }
    top(group, r.groups, r.top_groups, chosen);
    for (int64_t g = 0; g < r.groups; ++g)
      if (std::find(chosen, chosen + r.top_groups, g) == chosen + r.top_groups)
        std::fill_n(choice + g * size, size, kNone);
  }
  top(choice, n, r.choices, ids);
  float total = 0;
  for (int64_t c = 0; c < r.choices; ++c) total += weights[c] = logits[ids[c]];
  for (int64_t c = 0; c < r.choices; ++c)
    weights[c] = (r.normalize ? weights[c] / (total + 1e-20f) : weights[c]) * r.scale;
}

// h = rms_norm(x [m, hidden]), and of each row the experts and their weights [m, choices] by router [hidden, experts].
template <class X>
void route(Pool& pool, const X* x, int64_t m, int64_t hidden, const X* norm, float eps, const float* router,
           const float* bias, const Router& r, X* h, int32_t* ids, float* weights) {
  constexpr int64_t kRows = 16;
  pool.run((m + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t first = task * kRows, count = std::min(kRows, m - first);
    float *rows = scratch(1, kRows * hidden), *logits = scratch(2, kRows * r.experts + 2 * (r.experts + r.groups));
    for (int64_t i = 0; i < count; ++i) {
      widen_row(x + (first + i) * hidden, hidden, rows + i * hidden);
      rms_norm(rows + i * hidden, norm, hidden, eps);
      narrow_row(rows + i * hidden, hidden, h + (first + i) * hidden);
    }
    matmul(rows, hidden, count, router, r.experts, hidden, r.experts, logits, r.experts);
    for (int64_t i = 0; i < count; ++i)
      choose(logits + i * r.experts, bias, r, logits + kRows * r.experts, ids + (first + i) * r.choices,
             weights + (first + i) * r.choices);
  });
}

// Of each row x [m, n] the first index of its greatest number (0 if there is none) and log(sum(exp(x))).
inline void log_sum_exp(Pool& pool, const float* x, int64_t m, int64_t n, int32_t* best, float* out) {
  pool.run(m, [&](int64_t i) {
    const float* row = x + i * n;
    vf tops = splat(-std::numeric_limits<float>::infinity()), sums[4] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) tops = load(row + j) > tops ? load(row + j) : tops;
    float greatest = max(tops);
    for (; j < n; ++j) greatest = row[j] > greatest ? row[j] : greatest;
    for (j = 0; j + 4 * kLanes <= n; j += 4 * kLanes)
      for (int c = 0; c < 4; ++c) sums[c] += exp(load(row + j + c * kLanes) - greatest);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; j < n; ++j) total += exp(row[j] - greatest);
    const int64_t at = std::find(row, row + n, greatest) - row;
    best[i] = at < n ? static_cast<int32_t>(at) : 0;
    out[i] = greatest + std::log(total);
  });
}

// Puts new rows [layers, m, heads, dim] at their positions of pages, cache [layers, pages, heads, dim, size], or
// [layers, pages, heads, size, dim] if not `turned`. Rows whose page there is not are left out.
template <class X>
void write_rows(Pool& pool, X* cache, const X* fresh, const int32_t* position, const int32_t* page, int64_t layers,
                int64_t m, int64_t pages, int64_t heads, int64_t dim, int64_t size, bool turned) {
  pool.run(layers * heads, [&](int64_t task) {
    const int64_t layer = task / heads, head = task % heads;
    for (int64_t i = 0; i < m; ++i) {
      if (page[i] < 0 || page[i] >= pages || position[i] < 0) continue;
      const X* from = fresh + ((layer * m + i) * heads + head) * dim;
      X* to = cache + ((layer * pages + page[i]) * heads + head) * dim * size;
      const int64_t at = position[i] % size;
      if (turned)
        for (int64_t d = 0; d < dim; ++d) to[d * size + at] = from[d];
      else
        std::copy_n(from, dim, to + at * dim);
    }
  });
}

}  // namespace moe
