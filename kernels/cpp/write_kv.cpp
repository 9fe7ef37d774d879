// toka_cpp::write_kv: copies new keys and values to their slots of the paged cache.
#include "kernels.h"
#include "tensors.h"

namespace toka {
namespace {

constexpr int64_t kParallelValues = 1 << 16;  // fewer values than this are copied by the calling thread

template <typename S, typename T>
void copy_row(const S* from, T* to, int64_t count) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    for (int64_t d = 0; d < count; ++d) to[d] = static_cast<T>(static_cast<float>(from[d]));
  }
}

template <typename S, typename T>
void scatter(View<S> key, View<S> value, View<T> key_cache, View<T> value_cache, const Indices& slots) {
  const int64_t num_tokens = slots.size(), num_heads = key.sizes[1], head_dim = key.sizes[2];
  const int64_t num_blocks = key_cache.sizes[0], block_size = key_cache.sizes[2];
  for (int64_t t = 0; t < num_tokens; ++t) {
    STD_TORCH_CHECK(slots[t] < num_blocks * block_size, "slot ", slots[t], " is outside of the cache");
  }
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = slots[t];
      if (slot < 0) continue;
      for (int64_t h = 0; h < num_heads; ++h) {
        copy_row(key.at(t, h), key_cache.at(slot / block_size, h, slot % block_size), head_dim);
        copy_row(value.at(t, h), value_cache.at(slot / block_size, h, slot % block_size), head_dim);
      }
    }
  };
  const int64_t values_per_token = std::max<int64_t>(1, num_heads * head_dim);
  if (num_tokens * values_per_token < kParallelValues) return copy(0, num_tokens);
  torch::stable::parallel_for(0, num_tokens, std::max<int64_t>(1, kParallelValues / 2 / values_per_token), copy);
}

}  // namespace

void write_kv(Tensor key_THD, Tensor value_THD, Tensor key_cache, Tensor value_cache, Tensor slots_T) {
  const Tensor key = dense_last(key_THD), value = dense_last(value_THD);
  STD_TORCH_CHECK(key.dim() == 3 && value.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4,
                  "keys and values must be [T, H, D], the caches [blocks, H, block_size, D]");
  for (const Tensor& tensor : {key, value}) {
    STD_TORCH_CHECK(tensor.size(0) == slots_T.size(0) && tensor.size(1) == key_cache.size(1) && tensor.size(2) == key_cache.size(3),
                    "keys, values and slots don't fit the cache");
    STD_TORCH_CHECK(tensor.scalar_type() == key.scalar_type(), "keys and values must have one dtype");
  }
  for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(key_cache.size(d) == value_cache.size(d), "the caches differ in shape");
  STD_TORCH_CHECK(key_cache.scalar_type() == value_cache.scalar_type(), "the caches differ in dtype");

  with_float_type(key.scalar_type(), "key", [&](auto s) {
    with_float_type(key_cache.scalar_type(), "key_cache", [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      scatter(view<S>(key, 3, "key"), view<S>(value, 3, "value"), view<T>(key_cache, 4, "key_cache"),
              view<T>(value_cache, 4, "value_cache"), Indices(slots_T, "slots"));
    });
  });
}

}  // namespace toka
