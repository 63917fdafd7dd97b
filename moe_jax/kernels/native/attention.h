// Paged attention of a step's rows over the cache and the step's own new rows; see moe_jax/attention.py.
//
// Each row visits the pages before it in order, and itself last, whatever else is in the step: online softmax
// (Milakov and Gimelshein 2018).
#pragma once

#include "dense.h"

namespace moe {

template <class X>
struct Attention {
  const X *q, *new_k, *new_v, *k, *v;  // [T, heads, D], [T, kv, D], [T, kv, V], [pages, kv, D, P], [pages, kv, P, V]
  const int32_t *position, *tables, *start, *first_row, *tile_entry;
  int64_t rows, heads, kv_heads, key_dim, value_dim, page_size, pages, entries, pages_per_sequence, row_tile;
  bool latent;  // no new_v and v: values are the first value_dim of the keys
  X* out;       // [T, heads, V]

  int64_t groups() const { return heads / kv_heads; }

  int64_t page_at(int64_t entry, int64_t p) const {
    const int64_t page = tables[entry * pages_per_sequence + std::min(p, pages_per_sequence - 1)];
    return std::clamp<int64_t>(page, 0, pages - 1);
  }

  const X* keys(int64_t page, int64_t head) const { return k + (page * kv_heads + head) * key_dim * page_size; }

  const X* values(int64_t page, int64_t head, const X* keys, X* turned) const {
    if (!latent) return v + (page * kv_heads + head) * page_size * value_dim;
    for (int64_t d = 0; d < value_dim; ++d)
      for (int64_t j = 0; j < page_size; ++j) turned[j * value_dim + d] = keys[d * page_size + j];
    return turned;
  }

  // What `count` rows of one sequence, in order of position, see of it through one kv head, and themselves.
  // fresh: whether this step has rows of the sequence before them, from `start` of the entry on.
  void visit(int64_t first, int64_t count, int64_t entry, int64_t head, bool fresh) const {
    const int64_t g = groups(), n = count * g, size = page_size;
    float* queries = scratch(0, n * (key_dim + value_dim + size + 2));
    float *acc = queries + n * key_dim, *weights = acc + n * value_dim, *top = weights + n * size, *total = top + n;
    std::fill(acc, acc + n * value_dim, 0.0f);
    std::fill(top, top + n, -1e30f);
    std::fill(total, total + n, 0.0f);
    int64_t last = 0;
    for (int64_t r = 0; r < count; ++r) {
      widen_row(q + ((first + r) * heads + head * g) * key_dim, g * key_dim, queries + r * g * key_dim);
      last = std::max<int64_t>(last, position[first + r]);
    }
    X* page_k = reinterpret_cast<X*>(scratch(1, size * key_dim));
    X* page_v = reinterpret_cast<X*>(scratch(2, size * value_dim));
    const int64_t old = fresh ? start[entry] : last;  // positions before it are in the cache
    for (int64_t p = 0; p * size < last; ++p) {
      const int64_t base = p * size, filled = std::min(size, last - base), page = page_at(entry, p);
      const X *pk = keys(page, head), *pv;
      if (base + filled <= old) {
        pv = values(page, head, pk, page_v);
      } else {
        pk = mixed_keys(pk, entry, head, base, filled, old, page_k);
        pv = latent ? values(page, head, pk, page_v) : mixed_values(page, entry, head, base, filled, old, page_v);
      }
      int64_t r = 0;  // the first row that sees any of this page
      while (r < count && position[first + r] <= base) ++r;
      attend(queries, acc, weights, top, total, r * g, n - r * g, position + first, base, filled, pk, pv);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = r * g; i < (r + 1) * g; ++i)
        finish(queries + i * key_dim, acc + i * value_dim, top[i], total[i], first + r, head,
               out + ((first + r) * heads + head * g + i - r * g) * value_dim);
  }

 private:
  // f(offset, how many) for each vector of n numbers.
  template <class F>
  static void for_lanes(int64_t n, const F& f) {
    for (int64_t j = 0; j < n; j += kLanes) f(j, static_cast<int>(std::min<int64_t>(kLanes, n - j)));
  }

  int64_t new_row(int64_t entry, int64_t position) const {
    return std::clamp<int64_t>(first_row[entry] + position - start[entry], 0, rows - 1);
  }

  // A page of which this step fills a part; what nobody has filled is zeros.
  const X* mixed_keys(const X* cached, int64_t entry, int64_t head, int64_t base, int64_t filled, int64_t old,
                      X* out) const {
    const int64_t from_cache = std::clamp<int64_t>(old - base, 0, filled);
    std::memset(static_cast<void*>(out), 0, page_size * key_dim * sizeof(X));
    for (int64_t d = 0; d < key_dim; ++d) std::copy_n(cached + d * page_size, from_cache, out + d * page_size);
    for (int64_t j = from_cache; j < filled; ++j) {
      const X* row = new_k + (new_row(entry, base + j) * kv_heads + head) * key_dim;
      for (int64_t d = 0; d < key_dim; ++d) out[d * page_size + j] = row[d];
    }
    return out;
  }

  const X* mixed_values(int64_t page, int64_t entry, int64_t head, int64_t base, int64_t filled, int64_t old,
                        X* out) const {
    const int64_t from_cache = std::clamp<int64_t>(old - base, 0, filled);
    std::copy_n(v + (page * kv_heads + head) * page_size * value_dim, from_cache * value_dim, out);
    for (int64_t j = from_cache; j < filled; ++j)
      std::copy_n(new_v + (new_row(entry, base + j) * kv_heads + head) * value_dim, value_dim, out + j * value_dim);
    return out;
  }

  // One page for the queries [i, i + n): a query sees those of its positions that lie before its row's own.
  void attend(const float* queries, float* acc, float* weights, float* top, float* total, int64_t i, int64_t n,
              const int32_t* own, int64_t base, int64_t filled, const X* pk, const X* pv) const {
    const int64_t g = groups(), stride = page_size;
    const int64_t size = std::min(stride, (filled + kLanes - 1) / kLanes * kLanes);  // the others are not read
    matmul(queries + i * key_dim, key_dim, n, pk, stride, key_dim, size, weights + i * stride, stride);
    for (int64_t r = i; r < i + n; ++r) {
      const int64_t seen = std::clamp<int64_t>(own[r / g] - base, 0, filled);
      float* s = weights + r * stride;
      float* a = acc + r * value_dim;
      std::fill(s + seen, s + size, -2e30f);
      vf tops = splat(top[r]), sums{};
      for_lanes(size, [&](int64_t j, int n) {
        const vf x = n == kLanes ? load(s + j) : load(s + j, n);  // its zeros are no scores
        if (n == kLanes)
          tops = x > tops ? x : tops;
        else
          for (int lane = 0; lane < n; ++lane) tops[lane] = x[lane] > tops[lane] ? x[lane] : tops[lane];
      });
      const float m = max(tops), keep = exp(top[r] - m);
      for_lanes(size, [&](int64_t j, int n) {
        vf p = exp((n == kLanes ? load(s + j) : load(s + j, n)) - m);
        for (int lane = n; lane < kLanes; ++lane) p[lane] = 0;
        sums += p;
        if (n == kLanes)
          store(s + j, p);
        else
          std::memcpy(s + j, &p, n * sizeof(float));
      });
      top[r] = m;
      total[r] = total[r] * keep + sum(sums);
      for (int64_t d = 0; d < value_dim; ++d) a[d] *= keep;
    }
    matmul<X, true>(weights + i * stride, stride, n, pv, value_dim, filled, value_dim, acc + i * value_dim, value_dim);
  }

  // The row itself, of which the cache knows nothing yet.
  void finish(const float* query, const float* acc, float top, float total, int64_t row, int64_t head, X* out) const {
    float* key = scratch(3, key_dim + value_dim);
    float* value = key + key_dim;
    widen_row(new_k + (row * kv_heads + head) * key_dim, key_dim, key);
    if (latent)
      std::copy_n(key, value_dim, value);
    else
      widen_row(new_v + (row * kv_heads + head) * value_dim, value_dim, value);
    const float s = dot(query, key, key_dim), m = std::max(top, s), p = exp(s - m), keep = exp(top - m);
    const float scale = 1.0f / (total * keep + p);
    for (int64_t d = 0; d < value_dim; ++d) narrow((acc[d] * keep + p * value[d]) * scale, out + d);
  }
};

// Rows [0, decode) are entries of the same numbers; prefill rows come in tiles, up to tile number `tiles`.
template <class X>
void attend(Pool& pool, const Attention<X>& a, int64_t decode, int64_t tiles) {
  constexpr int64_t kRows = 64;  // neighbours of one sequence that visit its pages together
  struct Part {
    int64_t first, count, entry;
    bool fresh;
  };
  std::vector<Part> parts;
  decode = std::min({decode, a.rows, a.entries});
  tiles = std::min(tiles, a.rows / a.row_tile);
  for (int64_t r = 0; r < decode; ++r) parts.push_back({r, 1, r, false});
  for (int64_t i = (decode + a.row_tile - 1) / a.row_tile; i < tiles; ++i) {
    const int64_t entry = std::clamp<int64_t>(a.tile_entry[i], 0, a.entries - 1);
    const bool joins = !parts.empty() && parts.back().fresh && parts.back().entry == entry;
    if (joins && parts.back().count + a.row_tile <= kRows)
      parts.back().count += a.row_tile;
    else
      parts.push_back({i * a.row_tile, a.row_tile, entry, true});
  }
  pool.run(static_cast<int64_t>(parts.size()) * a.kv_heads, [&](int64_t i) {
    const Part& part = parts[i / a.kv_heads];
    a.visit(part.first, part.count, part.entry, i % a.kv_heads, part.fresh);
  });
}

}  // namespace moe
