// Plain views of the tensors that an operator was called with, checked once at its door.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>

#include "simd.h"

namespace toka {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor of up to four dimensions whose last one is dense; strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t sizes[4];
  int64_t strides[4];

  // The same memory as another type (of a view whose element type was left open).
  template <typename U>
  View<U> as() const {
    View<U> other{static_cast<U*>(data), {}, {}};
    for (int d = 0; d < 4; ++d) other.sizes[d] = sizes[d], other.strides[d] = strides[d];
    return other;
  }

  T* at(int64_t i) const { return data + i * strides[0]; }
  T* at(int64_t i, int64_t j) const { return data + i * strides[0] + j * strides[1]; }
  T* at(int64_t i, int64_t j, int64_t k) const { return data + i * strides[0] + j * strides[1] + k * strides[2]; }
};

// A view of `tensor`, whose dtype the caller knows to be T's; T = void leaves it open. `name` is for the message.
template <typename T>
View<T> view(const Tensor& tensor, int64_t num_dims, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == num_dims, name, " must have ", num_dims, " dimensions, has ", tensor.dim());
  View<T> result{static_cast<T*>(tensor.data_ptr()), {1, 1, 1, 1}, {0, 0, 0, 0}};
  for (int64_t d = 0; d < num_dims; ++d) {
    result.sizes[d] = tensor.size(d);
    result.strides[d] = tensor.stride(d);
  }
  const bool dense = result.sizes[num_dims - 1] <= 1 || result.strides[num_dims - 1] == 1;
  STD_TORCH_CHECK(dense, name, " must be dense in its last dimension");
  return result;
}

// A view of a table or an index list: dtype and density are part of the contract.
template <typename T>
View<const T> table(const Tensor& tensor, int64_t num_dims, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", is ",
                  torch::headeronly::toString(tensor.scalar_type()));
  return view<T>(tensor, num_dims, name).template as<const T>();
}

// A list of int32 or int64; decided per element, which costs nothing beside what is done with one, and halves the code to compile.
class Indices {
 public:
  Indices(const Tensor& tensor, const char* name)
      : is_wide_(tensor.scalar_type() == ScalarType::Long),
        wide_(is_wide_ ? table<int64_t>(tensor, 1, ScalarType::Long, name).data : nullptr),
        narrow_(is_wide_ ? nullptr : table<int32_t>(tensor, 1, ScalarType::Int, name).data),
        size_(tensor.size(0)) {}

  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const { return is_wide_ ? wide_[i] : narrow_[i]; }

 private:
  bool is_wide_;
  const int64_t* wide_;
  const int32_t* narrow_;
  int64_t size_;
};

// Activations may come in any layout; the kernels want the last dimension dense.
inline Tensor dense_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A new contiguous tensor on the CPU; straight through the C shim, since a dispatcher call costs microseconds.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[4] = {1, 1, 1, 1};
  const int64_t num_dims = static_cast<int64_t>(sizes.size());
  for (int64_t d = num_dims - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(1, sizes.begin()[d + 1]);
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(num_dims, sizes.begin(), strides, shim_dtype, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

// Calls body with a value of the C++ type that stores `dtype`.
template <typename Body>
auto with_float_type(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, is ", torch::headeronly::toString(dtype));
  }
}

// The same with an integer of that size, for code that only moves values.
template <typename Body>
auto with_storage_type(ScalarType dtype, const char* name, Body&& body) {
  return with_float_type(dtype, name, [&](auto zero) {
    if constexpr (sizeof(zero) == 4) {
      return body(uint32_t{});
    } else {
      return body(uint16_t{});
    }
  });
}

}  // namespace toka
