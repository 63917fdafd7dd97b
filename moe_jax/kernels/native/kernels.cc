// What XLA calls, by way of its foreign function interface: arguments are checked and cut to a layer here.
#include "attention.h"
#include "dense.h"
#include "expert_ffn.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using Out = ffi::Result<AnyBuffer>;

namespace {

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(std::string("moe_jax: unexpected ") + what); }

int64_t number(const AnyBuffer& x) { return *static_cast<const int32_t*>(x.untyped_data()); }

bool is_bf16(const AnyBuffer& x) { return x.element_type() == DataType::BF16 || x.element_type() == DataType::U16; }
bool is_f32(const AnyBuffer& x) { return x.element_type() == DataType::F32; }

template <class T>
T* data(const AnyBuffer& x) {
  return static_cast<T*>(x.untyped_data());
}

// Part `index` of the leading axis; null for an array of no elements, which stands for none.
template <class T>
const T* part(const AnyBuffer& x, int64_t index) {
  const int64_t parts = x.dimensions()[0], size = parts ? x.element_count() / parts : 0;
  return size ? data<const T>(x) + std::clamp<int64_t>(index, 0, parts - 1) * size : nullptr;
}

template <class X, class W, class Y>
ffi::Error run_dense(moe::Pool pool, const AnyBuffer& x, const AnyBuffer& w, const AnyBuffer& norm,
                     const AnyBuffer& bias, const AnyBuffer& residual, int64_t layer, int64_t count, float eps,
                     const AnyBuffer& y) {
  const auto shape = w.dimensions();
  const int64_t batch = shape[1], k = shape[2], n = shape[3], total = x.dimensions()[0];
  const int64_t m = std::clamp<int64_t>(count, 0, total);
  const X* added = residual.element_count() ? data<const X>(residual) : nullptr;
  moe::dense(pool, data<const X>(x), m, batch, k, part<W>(w, layer), n, part<X>(norm, layer), eps, part<X>(bias, layer),
             added, data<Y>(y));
  std::memset(static_cast<void*>(data<Y>(y) + m * batch * n), 0, (total - m) * batch * n * sizeof(Y));
  return ffi::Error::Success();
}

// x [T, B, K], w [L, B, K, N], norm [L, K], bias [L, N], residual [T, N], layer [], rows []: y [T, B, N].
ffi::Error dense(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer w, AnyBuffer norm, AnyBuffer bias, AnyBuffer residual,
                 AnyBuffer layer, AnyBuffer rows, Out y, float eps) {
  const int64_t l = number(layer), m = number(rows);
  const moe::Pool pool(threads);
  if (x.dimensions().size() != 3 || w.dimensions().size() != 4) return wrong("shape of a dense layer's weights");
  if (is_f32(x) && is_f32(*y)) {
    if (is_f32(w)) return run_dense<float, float, float>(pool, x, w, norm, bias, residual, l, m, eps, *y);
    if (is_bf16(w)) return run_dense<float, moe::bf16, float>(pool, x, w, norm, bias, residual, l, m, eps, *y);
  } else if (is_bf16(x)) {
    using moe::bf16;
    if (is_bf16(w) && is_bf16(*y)) return run_dense<bf16, bf16, bf16>(pool, x, w, norm, bias, residual, l, m, eps, *y);
    if (is_bf16(w) && is_f32(*y)) return run_dense<bf16, bf16, float>(pool, x, w, norm, bias, residual, l, m, eps, *y);
    if (is_f32(w) && is_f32(*y)) return run_dense<bf16, float, float>(pool, x, w, norm, bias, residual, l, m, eps, *y);
  }
  return wrong("types of a dense layer");
}

template <class X, class W>
ffi::Error run_expert_ffn(moe::Pool pool, const AnyBuffer& x, const AnyBuffer& slot, const AnyBuffer& gate_up,
                          const AnyBuffer& down, int64_t layer, const AnyBuffer& y) {
  const auto rows = slot.dimensions(), shape = down.dimensions();
  moe::expert_ffn(pool, data<const X>(x), data<const int32_t>(slot), rows[0], rows[1], shape[3],
                  part<W>(gate_up, layer), part<W>(down, layer), shape[1], shape[2], data<X>(y));
  return ffi::Error::Success();
}

// x [M, H], slot [M, C], gate_up [L, S, H, 2 I], down [L, S, I, H], layer []: y [M, C, H].
ffi::Error expert_ffn(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer slot, AnyBuffer gate_up, AnyBuffer down,
                      AnyBuffer layer, Out y) {
  const int64_t l = number(layer);
  const moe::Pool pool(threads);
  if (is_f32(x) && is_f32(down)) return run_expert_ffn<float, float>(pool, x, slot, gate_up, down, l, *y);
  if (is_f32(x) && is_bf16(down)) return run_expert_ffn<float, moe::bf16>(pool, x, slot, gate_up, down, l, *y);
  if (is_bf16(x) && is_bf16(down)) return run_expert_ffn<moe::bf16, moe::bf16>(pool, x, slot, gate_up, down, l, *y);
  return wrong("types of the experts");
}

template <class X>
ffi::Error run_attend(moe::Pool pool, const AnyBuffer& q, const AnyBuffer& new_k, const AnyBuffer& new_v,
                      const AnyBuffer& k, const AnyBuffer& v, int64_t layer, const AnyBuffer& position,
                      const AnyBuffer& tables, const AnyBuffer& start, const AnyBuffer& first_row,
                      const AnyBuffer& tile_entry, int64_t decode, int64_t tiles, int64_t row_tile,
                      const AnyBuffer& out) {
  const auto queries = q.dimensions(), cache = k.dimensions(), results = out.dimensions();
  moe::Attention<X> a;
  a.q = data<const X>(q), a.new_k = data<const X>(new_k), a.new_v = data<const X>(new_v);
  a.k = part<X>(k, layer), a.v = part<X>(v, layer);
  a.position = data<const int32_t>(position), a.tables = data<const int32_t>(tables);
  a.start = data<const int32_t>(start), a.first_row = data<const int32_t>(first_row);
  a.tile_entry = data<const int32_t>(tile_entry);
  a.rows = queries[0], a.heads = queries[1], a.key_dim = queries[2], a.value_dim = results[2];
  a.pages = cache[1], a.kv_heads = cache[2], a.page_size = cache[4];
  a.entries = tables.dimensions()[0], a.pages_per_sequence = tables.dimensions()[1], a.row_tile = row_tile;
  a.latent = v.element_count() == 0;
  a.out = data<X>(out);
  std::memset(static_cast<void*>(a.out), 0, out.size_bytes());
  moe::attend(pool, a, decode, tiles);
  return ffi::Error::Success();
}

// q [T, heads, D], new k [T, kv, D] and v [T, kv, V], cache k [L, pages, kv, D, P] and v [L, pages, kv, P, V], both v
// of no elements for latent attention, layer [], position [T], tables [E, N], start [E], first row [E],
// entry of each tile [T / row_tile], decode rows [], tiles []: out [T, heads, V].
ffi::Error attend(ffi::ThreadPool threads, AnyBuffer q, AnyBuffer new_k, AnyBuffer new_v, AnyBuffer k, AnyBuffer v,
                  AnyBuffer layer, AnyBuffer position, AnyBuffer tables, AnyBuffer start, AnyBuffer first_row,
                  AnyBuffer tile_entry, AnyBuffer decode, AnyBuffer tiles, Out out, int64_t row_tile) {
  const auto run = is_f32(q) ? run_attend<float> : run_attend<moe::bf16>;
  if (q.element_type() != k.element_type() || !(is_f32(q) || is_bf16(q))) return wrong("types of attention");
  return run(moe::Pool(threads), q, new_k, new_v, k, v, number(layer), position, tables, start, first_row, tile_entry,
             number(decode), number(tiles), row_tile, *out);
}

template <class X>
ffi::Error run_split_heads(moe::Pool pool, const AnyBuffer& x, const AnyBuffer& q_norm, const AnyBuffer& k_norm,
                           const AnyBuffer& cos, const AnyBuffer& sin, int64_t layer, int64_t rows, moe::Heads h,
                           const AnyBuffer& q, const AnyBuffer& k, const AnyBuffer& v) {
  h.queries = q.dimensions()[1], h.keys = k.dimensions()[1], h.dim = q.dimensions()[2];
  for (const AnyBuffer* out : {&q, &k, &v}) std::memset(out->untyped_data(), 0, out->size_bytes());
  const int64_t m = std::clamp<int64_t>(rows, 0, x.dimensions()[0]);
  moe::split_heads(pool, data<const X>(x), m, h, part<X>(q_norm, layer), part<X>(k_norm, layer), data<const float>(cos),
                   data<const float>(sin), data<X>(q), data<X>(k), data<X>(v));
  return ffi::Error::Success();
}

// x [T, (heads + 2 kv) D], q norm and k norm [L, ...], cos and sin [T, D / 2], layer [], rows []: q [T, heads, D],
// k and v [T, kv, D].
ffi::Error split_heads(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer q_norm, AnyBuffer k_norm, AnyBuffer cos,
                       AnyBuffer sin, AnyBuffer layer, AnyBuffer rows, Out q, Out k, Out v, int64_t norm, float eps,
                       float clip, float scale, bool interleaved) {
  const moe::Heads h{0, 0, 0, norm, eps, clip, scale, interleaved};
  const auto run = is_f32(x) ? run_split_heads<float> : run_split_heads<moe::bf16>;
  if (!(is_f32(x) || is_bf16(x)) || !is_f32(cos)) return wrong("types of a projection");
  return run(moe::Pool(threads), x, q_norm, k_norm, cos, sin, number(layer), number(rows), h, *q, *k, *v);
}

template <class X>
ffi::Error run_route(moe::Pool pool, const AnyBuffer& x, const AnyBuffer& norm, const AnyBuffer& router,
                     const AnyBuffer& bias, int64_t layer, int64_t rows, float eps, moe::Router r, const AnyBuffer& h,
                     const AnyBuffer& ids, const AnyBuffer& weights) {
  for (const AnyBuffer* out : {&h, &ids, &weights}) std::memset(out->untyped_data(), 0, out->size_bytes());
  const int64_t m = std::clamp<int64_t>(rows, 0, x.dimensions()[0]);
  moe::route(pool, data<const X>(x), m, x.dimensions()[1], part<X>(norm, layer), eps, part<float>(router, layer),
             part<float>(bias, layer), r, data<X>(h), data<int32_t>(ids), data<float>(weights));
  return ffi::Error::Success();
}

// x [T, H], norm [L, H], router [L, H, E], bias [L, E], layer [], rows []: h [T, H], ids [T, C], weights [T, C].
ffi::Error route(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer norm, AnyBuffer router, AnyBuffer bias,
                 AnyBuffer layer, AnyBuffer rows, Out h, Out ids, Out weights, float eps, int64_t groups,
                 int64_t top_groups, bool sigmoid, bool best_two, bool normalize, float scale) {
  const int64_t experts = router.dimensions()[2], choices = ids->dimensions()[1];
  const moe::Router r{experts, choices, groups, top_groups, sigmoid, best_two, normalize, scale};
  const auto run = is_f32(x) ? run_route<float> : run_route<moe::bf16>;
  if (!(is_f32(x) || is_bf16(x)) || !is_f32(router)) return wrong("types of a router");
  if (groups < 1 || experts % groups || experts / groups < 1 + best_two || choices > experts)
    return wrong("groups of experts");
  return run(moe::Pool(threads), x, norm, router, bias, number(layer), number(rows), eps, r, *h, *ids, *weights);
}

// x [T, N], rows []: the best index [T], log of the sum of exponentials [T].
ffi::Error log_sum_exp(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer rows, Out best, Out out) {
  moe::Pool pool(threads);
  const int64_t m = std::clamp<int64_t>(number(rows), 0, x.dimensions()[0]);
  if (!is_f32(x)) return wrong("type of logits");
  std::memset(best->untyped_data(), 0, best->size_bytes());
  std::memset(out->untyped_data(), 0, out->size_bytes());
  moe::log_sum_exp(pool, data<const float>(x), m, x.dimensions()[1], data<int32_t>(*best), data<float>(*out));
  return ffi::Error::Success();
}

// cache [L, pages, heads, D, P], or [L, pages, heads, P, D] if not turned, new [L, T, heads, D], position [T],
// page [T]: the cache, which should be where the given one is.
ffi::Error write_rows(ffi::ThreadPool threads, AnyBuffer cache, AnyBuffer fresh, AnyBuffer position, AnyBuffer page,
                      Out out, bool turned) {
  moe::Pool pool(threads);
  const auto to = cache.dimensions(), from = fresh.dimensions();
  if (out->untyped_data() != cache.untyped_data())
    std::memcpy(out->untyped_data(), cache.untyped_data(), cache.size_bytes());
  const int64_t size = turned ? to[4] : to[3];
  const auto run = [&](auto type) {
    using X = decltype(type);
    moe::write_rows(pool, data<X>(*out), data<const X>(fresh), data<const int32_t>(position), data<const int32_t>(page),
                    to[0], from[1], to[1], to[2], from[3], size, turned);
  };
  if (is_f32(cache) && is_f32(fresh))
    run(float{});
  else if (is_bf16(cache) && is_bf16(fresh))
    run(moe::bf16{});
  else
    return wrong("types of a cache");
  return ffi::Error::Success();
}

}  // namespace

#define ARG Arg<AnyBuffer>()
#define ARGS5 ARG.ARG.ARG.ARG.ARG
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moe_jax_dense, dense, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARGS5.ARG.ARG.Ret<AnyBuffer>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_expert_ffn, expert_ffn,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARGS5.Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moe_jax_attend, attend,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARGS5.ARGS5.ARG.ARG.ARG.Ret<AnyBuffer>().Attr<int64_t>("row_tile"));
#define RET Ret<AnyBuffer>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_split_heads, split_heads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .ARGS5.ARG.ARG.RET.RET.RET.Attr<int64_t>("norm")
                                  .Attr<float>("eps")
                                  .Attr<float>("clip")
                                  .Attr<float>("scale")
                                  .Attr<bool>("interleaved"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_route, route,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .ARGS5.ARG.RET.RET.RET.Attr<float>("eps")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("top_groups")
                                  .Attr<bool>("sigmoid")
                                  .Attr<bool>("best_two")
                                  .Attr<bool>("normalize")
                                  .Attr<float>("scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_log_sum_exp, log_sum_exp,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARG.ARG.RET.RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_write_rows, write_rows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().ARG.ARG.ARG.ARG.RET.Attr<bool>("turned"));
