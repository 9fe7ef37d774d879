// Gives the operators that op_schema.py defines under `toka_cpp` their CPU implementation.
#include <torch/csrc/stable/library.h>

#include "kernels.h"

STABLE_TORCH_LIBRARY_IMPL(toka_cpp, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&toka::write_kv));
  m.impl("paged_attention", TORCH_BOX(&toka::paged_attention));
  m.impl("encoder_attention", TORCH_BOX(&toka::encoder_attention));
  m.impl("sum_tokens", TORCH_BOX(&toka::sum_tokens));
  m.impl("sample", TORCH_BOX(&toka::sample));
  m.impl("adjust_logits", TORCH_BOX(&toka::adjust_logits));
  m.impl("token_logprobs", TORCH_BOX(&toka::token_logprobs));
  m.impl("rope_write_kv", TORCH_BOX(&toka::rope_write_kv));
  m.impl("pack_linear", TORCH_BOX(&toka::pack_linear));
  m.impl("linear_packed", TORCH_BOX(&toka::linear_packed));
  m.impl("embedding_packed", TORCH_BOX(&toka::embedding_packed));
  m.impl("pack_quantised", TORCH_BOX(&toka::pack_quantised));
  m.impl("linear_quantised_packed", TORCH_BOX(&toka::linear_quantised_packed));
  m.impl("embedding_quantised_packed", TORCH_BOX(&toka::embedding_quantised_packed));
}
