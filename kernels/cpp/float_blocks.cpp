// multiply_block (linear_packed.h) of all heights, compiled once for all who use it.
#include "float_product.h"

namespace toka {
namespace {

template <int... Below>
constexpr std::array<MultiplyFloats, kBlockRows> by_rows(std::integer_sequence<int, Below...>) {
  return {multiply_block<Below + 1, 1>...};
}

template <int... Below>
constexpr std::array<MultiplyFloats, kBlockRows> by_rows_several_panels(std::integer_sequence<int, Below...>) {
  return {multiply_block<Below + 1, panels_at_once(Below + 1)>...};
}

}  // namespace

const std::array<MultiplyFloats, kBlockRows> kMultiplyOne = by_rows(std::make_integer_sequence<int, kBlockRows>());
const std::array<MultiplyFloats, kBlockRows> kMultiplySeveral = by_rows_several_panels(std::make_integer_sequence<int, kBlockRows>());

}  // namespace toka
