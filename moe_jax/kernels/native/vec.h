// Vectors of float on any machine (GCC's and Clang's vector extension), and the two products that all kernels use.
//
// Every output is one chain of fused multiply-adds over its own row and column, first to last, so its bits depend on
// neither the other rows and columns nor on how they are blocked here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace moe {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, bf16* y) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline vf load(const bf16* p) {
  return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vi) << 16);
}
inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }

// The first n lanes; the others are zeros.
template <class T>
inline vf load(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

inline float sum(vf x) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline float max(vf x) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i + half] > x[i] ? x[i + half] : x[i];
  return x[0];
}

// e^x to 2 units in the last place; 0 below -87 (S. Moshier, Cephes, expf).
inline vf exp(vf x) {
  const vf top = splat(88.0f), bottom = splat(-87.0f);
  const vi vanishes = x < bottom;
  x = x > top ? top : x;
  x = vanishes ? bottom : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * (r * r) + r) + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  y = y * reinterpret_cast<vf>(power);
  return vanishes ? vf{} : y;
}

inline float exp(float x) { return exp(splat(x))[0]; }

// Weights come in units of one vector, or of two if they are bfloat16: even and odd numbers apart, which costs least.
template <class T>
constexpr int kUnit = std::is_same_v<T, bf16> ? 2 : 1;

inline void load_unit(const float* p, vf* x) { *x = load(p); }
inline void load_unit(const bf16* p, vf* x) {
  const vi both = *reinterpret_cast<const vi*>(p);
  x[0] = reinterpret_cast<vf>(both << 16), x[1] = reinterpret_cast<vf>(both & int32_t(0xffff0000));
}

// A unit's results, in the order of columns.
template <class T>
inline void store_unit(const vf* x, float* y) {
  if constexpr (kUnit<T> == 1) return store(y, *x);
  for (int i = 0; i < kLanes; ++i) y[2 * i] = x[0][i], y[2 * i + 1] = x[kUnit<T> - 1][i];
}

template <class T>
inline void take_unit(const float* y, vf* x) {
  if constexpr (kUnit<T> == 1)
    *x = load(y);
  else
    for (int i = 0; i < kLanes; ++i) x[0][i] = y[2 * i], x[1][i] = y[2 * i + 1];
}

// R rows and C units of columns of a product, which fit the registers.
template <int R, int C, class T, bool kAdd>
inline void block(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, float* y, int64_t ldy) {
  constexpr int kWidth = kUnit<T> * kLanes;
  vf acc[R][C * kUnit<T>];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C * kUnit<T>; ++c) acc[r][c] = vf{};
  if constexpr (kAdd)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) take_unit<T>(y + r * ldy + c * kWidth, acc[r] + c * kUnit<T>);
  for (int64_t i = 0; i < k; ++i) {
    vf b[C * kUnit<T>];
    for (int c = 0; c < C; ++c) load_unit(w + i * ldw + c * kWidth, b + c * kUnit<T>);
    for (int c = 0; c < C; c += kUnit<T> == 1 ? 4 : 1) __builtin_prefetch(w + (i + 24) * ldw + c * kWidth);
    for (int r = 0; r < R; ++r) {
      const vf a = splat(x[r * ldx + i]);
      for (int c = 0; c < C * kUnit<T>; ++c) acc[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store_unit<T>(acc[r] + c * kUnit<T>, y + r * ldy + c * kWidth);
}

// The last n columns, less than a unit.
template <class T, bool kAdd>
inline void edge(const float* x, const T* w, int64_t ldw, int64_t k, float* y, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const int left = static_cast<int>(n - c < kLanes ? n - c : kLanes);
    vf acc = kAdd ? load(y + c, left) : vf{};
    for (int64_t i = 0; i < k; ++i) acc += splat(x[i]) * load(w + i * ldw + c, left);
    std::memcpy(y + c, &acc, left * sizeof(float));
  }
}

template <int R, class T, bool kAdd>
void rows(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, int64_t n, float* y, int64_t ldy) {
  // With few rows, more columns hide the latency of the additions.
  constexpr int C = kUnit<T> == 2 ? 2 : R <= 2 ? 6 : R <= 6 ? 4 : 3, kWidth = kUnit<T> * kLanes;
  int64_t j = 0;
  for (; j + C * kWidth <= n; j += C * kWidth) block<R, C, T, kAdd>(x, ldx, w + j, ldw, k, y + j, ldy);
  if constexpr (C > 4)
    for (; j + 4 * kWidth <= n; j += 4 * kWidth) block<R, 4, T, kAdd>(x, ldx, w + j, ldw, k, y + j, ldy);
  if constexpr (C > 2)
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) block<R, 2, T, kAdd>(x, ldx, w + j, ldw, k, y + j, ldy);
  for (; j + kWidth <= n; j += kWidth) block<R, 1, T, kAdd>(x, ldx, w + j, ldw, k, y + j, ldy);
  if (j < n)
    for (int r = 0; r < R; ++r) edge<T, kAdd>(x + r * ldx, w + j, ldw, k, y + r * ldy + j, n - j);
}

// y[m, n] = x[m, k] @ w[k, n], or y += with kAdd; ld* are the distances between rows.
template <class T, bool kAdd = false>
void matmul(const float* x, int64_t ldx, int64_t m, const T* w, int64_t ldw, int64_t k, int64_t n, float* y,
            int64_t ldy) {
  using Rows = void (*)(const float*, int64_t, const T*, int64_t, int64_t, int64_t, float*, int64_t);
  static constexpr Rows kRows[] = {rows<1, T, kAdd>, rows<2, T, kAdd>, rows<3, T, kAdd>, rows<4, T, kAdd>,
                                   rows<5, T, kAdd>, rows<6, T, kAdd>, rows<7, T, kAdd>, rows<8, T, kAdd>};
  constexpr int64_t kMost = kUnit<T> == 1 ? 8 : 6;
  for (int64_t blocks = (m + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int64_t r = (m + blocks - 1) / blocks;  // as even as can be
    kRows[r - 1](x, ldx, w, ldw, k, n, y, ldy);
    x += r * ldx, y += r * ldy, m -= r;
  }
}

}  // namespace moe
