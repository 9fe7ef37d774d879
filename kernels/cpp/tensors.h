// Plain views of the tensors that an operator was called with, checked once at its door.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

  T* at(int64_t i) const { return data + i * strides[0]; }
  T* at(int64_t i, int64_t j) const { return data + i * strides[0] + j * strides[1]; }
  T* at(int64_t i, int64_t j, int64_t k) const { return data + i * strides[0] + j * strides[1] + k * strides[2]; }
};

// A view of `tensor`, whose dtype must be T's. `name` is for the message.
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
  const View<T> result = view<T>(tensor, num_dims, name);
  View<const T> constant{result.data, {}, {}};
  for (int d = 0; d < 4; ++d) constant.sizes[d] = result.sizes[d], constant.strides[d] = result.strides[d];
  return constant;
}

// Activations may come in any layout; the kernels want the last dimension dense.
inline Tensor dense_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
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

}  // namespace toka
