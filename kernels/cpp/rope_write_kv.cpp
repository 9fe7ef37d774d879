// toka_cpp::rope_write_kv: turns queries and keys by their tokens' angles and stores keys and values in the paged cache, in one pass.
//
// Products are rounded before they are added, as plain torch does it, so float32 results are those of the reference to the bit.
// 16-bit activations are turned in float32 and rounded once, where plain torch rounds after each of the three operations.
#include "kernels.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kParallelValues = 1 << 15;  // fewer values than this are moved by the calling thread
constexpr int64_t kMaxHeadDim = 256;

// to[0:2F] = from[0:2F] with the pairs (i, i + F) turned. `to` may not overlap `from`.
template <typename S>
inline void turn(const S* from, const S* cos, const S* sin, int64_t half, S* to) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const vfloat first = load_part(from + i, count), second = load_part(from + half + i, count);
    const vfloat c = load_part(cos + i, count), s = load_part(sin + i, count);
    store_part(to + i, rounded(first * c) - rounded(second * s), count);
    store_part(to + half + i, rounded(second * c) + rounded(first * s), count);
  }
}

template <typename S, typename T>
inline void copy_head(const S* from, int64_t head_dim, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, from, head_dim * sizeof(T));
  } else {
    for (int64_t d = 0; d < head_dim; d += kLanes) store_part(to + d, load_part(from + d, head_dim - d), head_dim - d);
  }
}

// Keys are rounded to their own dtype first, then to the cache's, as if the turned keys had been written by write_kv.
template <typename S, typename T>
inline void turn_into_cache(const S* from, const S* cos, const S* sin, int64_t half, T* to) {
  if constexpr (std::is_same_v<S, T>) {
    turn(from, cos, sin, half, to);
  } else {
    S turned[kMaxHeadDim];
    turn(from, cos, sin, half, turned);
    copy_head(turned, 2 * half, to);
  }
}

template <typename S, typename T>
void run(View<const S> query, View<const S> key, View<const S> value, View<const S> cos, View<const S> sin, View<T> key_cache,
         View<T> value_cache, const Indices& slots, View<S> out) {
  const int64_t num_tokens = query.sizes[0], head_dim = query.sizes[2], half = head_dim / 2;
  const int64_t num_blocks = key_cache.sizes[0], block_size = key_cache.sizes[2];
  for (int64_t t = 0; t < num_tokens; ++t) {
    STD_TORCH_CHECK(slots[t] < num_blocks * block_size, "slot ", slots[t], " is outside of the cache");
  }
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < query.sizes[1]; ++h) turn(query.at(t, h), cos.at(t), sin.at(t), half, out.at(t, h));
      const int64_t slot = slots[t];
      if (slot < 0) continue;
      for (int64_t h = 0; h < key.sizes[1]; ++h) {
        turn_into_cache(key.at(t, h), cos.at(t), sin.at(t), half, key_cache.at(slot / block_size, h, slot % block_size));
        copy_head(value.at(t, h), head_dim, value_cache.at(slot / block_size, h, slot % block_size));
      }
    }
  };
  const int64_t values_per_token = std::max<int64_t>(1, (query.sizes[1] + 2 * key.sizes[1]) * head_dim);
  if (num_tokens * values_per_token < kParallelValues) return work(0, num_tokens);
  torch::stable::parallel_for(0, num_tokens, std::max<int64_t>(1, kParallelValues / 2 / values_per_token), work);
}

}  // namespace

Tensor rope_write_kv(Tensor query_THD, Tensor key_THD, Tensor value_THD, Tensor cos_TF, Tensor sin_TF, Tensor key_cache,
                     Tensor value_cache, Tensor slots_T) {
  const Tensor query = dense_last(query_THD), key = dense_last(key_THD), value = dense_last(value_THD);
  const Tensor cos = dense_last(cos_TF), sin = dense_last(sin_TF);
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4,
                  "queries, keys and values must be [T, H, D], the caches [blocks, H, block_size, D]");
  const int64_t num_tokens = slots_T.size(0), head_dim = query.size(2);
  STD_TORCH_CHECK(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "head dim must be even and at most ", kMaxHeadDim, ", is ", head_dim);
  STD_TORCH_CHECK(query.size(0) == num_tokens, "queries and slots differ in their number of tokens");
  for (const Tensor& tensor : {key, value}) {
    STD_TORCH_CHECK(tensor.size(0) == num_tokens && tensor.size(1) == key_cache.size(1) && tensor.size(2) == head_dim &&
                        key_cache.size(3) == head_dim,
                    "queries, keys, values and slots don't fit the cache");
  }
  for (const Tensor& angles : {cos, sin}) {
    STD_TORCH_CHECK(angles.dim() == 2 && angles.size(0) == num_tokens && angles.size(1) == head_dim / 2, "cos and sin must be [T, D / 2]");
  }
  for (const Tensor& tensor : {key, value, cos, sin}) {
    STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), "queries, keys, values, cos and sin must have one dtype");
  }
  for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(key_cache.size(d) == value_cache.size(d), "the caches differ in shape");
  STD_TORCH_CHECK(key_cache.scalar_type() == value_cache.scalar_type(), "the caches differ in dtype");

  const Indices slots(slots_T, "slots");
  Tensor turned = empty({num_tokens, query.size(1), head_dim}, query.scalar_type());
  with_float_type(query.scalar_type(), "query", [&](auto s) {
    with_float_type(key_cache.scalar_type(), "key_cache", [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      const auto input = [](const Tensor& tensor, const char* name) {
        return view<S>(tensor, tensor.dim(), name).template as<const S>();
      };
      run(input(query, "query"), input(key, "key"), input(value, "value"), input(cos, "cos"), input(sin, "sin"),
          view<T>(key_cache, 4, "key_cache"), view<T>(value_cache, 4, "value_cache"), slots, view<S>(turned, 3, "turned"));
    });
  });
  return turned;
}

}  // namespace toka
