// Groups of rows that share the keys of a prefix (Hydragen), read from the operator's arguments and checked once.
#pragma once

#include <optional>
#include <vector>

#include "attention_tile.h"
#include "tensors.h"

namespace toka {

constexpr int kMaxSharedLevels = 3;  // MAX_SHARED_LEVELS of op_schema.py
constexpr int kSharedPrefixStep = 64;  // SHARED_PREFIX_STEP: whole tiles, so that a tile belongs to one group or to none
static_assert(kSharedPrefixStep % kTile == 0);

// Rows that hold the same blocks for positions [begin, end): places in the batch, each with one query.
struct SharedGroup {
  const int32_t* members;
  int64_t num_members;
  int64_t begin, end;
};

// The groups of one step by level, and for every place in the batch where its own part begins.
class SharedGroups {
 public:
  SharedGroups() = default;

  // groups [G, 5], members [N], as in op_schema.py; query_start and seq_lens are those of the step.
  SharedGroups(const Tensor& groups, const Tensor& members, View<const int32_t> query_start, View<const int32_t> seq_lens) {
    const auto table_of_groups = table<int32_t>(groups, 2, ScalarType::Int, "shared_groups");
    const auto places = table<int32_t>(members, 1, ScalarType::Int, "shared_members");
    STD_TORCH_CHECK(table_of_groups.sizes[1] == 5, "shared_groups must be [G, 5]");
    for (int64_t g = 0; g < table_of_groups.sizes[0]; ++g) {
      const int32_t* group = table_of_groups.at(g);
      if (group[1] == group[2]) break;
      STD_TORCH_CHECK(0 <= group[0] && group[0] < kMaxSharedLevels, "shared_groups: a level of ", group[0]);
      STD_TORCH_CHECK(0 <= group[1] && group[1] < group[2] && group[2] <= places.sizes[0],
                      "shared_groups: members outside of shared_members");
      add(group[0], {places.at(group[1]), group[2] - group[1], group[3], group[4]}, query_start, seq_lens);
    }
  }

  bool empty() const { return own_begin_.empty(); }

  const std::vector<SharedGroup>& at_level(int level) const { return levels_[level]; }

  // First position that the plain path computes for this place in the batch.
  int64_t own_begin(int64_t place) const { return own_begin_.empty() ? 0 : own_begin_[place]; }

 private:
  void add(int level, const SharedGroup& group, View<const int32_t> query_start, View<const int32_t> seq_lens) {
    const int64_t num_rows = seq_lens.sizes[0];
    if (own_begin_.empty()) own_begin_.assign(num_rows, 0);
    STD_TORCH_CHECK(0 <= group.begin && group.begin < group.end && group.begin % kSharedPrefixStep == 0 &&
                        group.end % kSharedPrefixStep == 0,
                    "shared_groups: positions must ascend in steps of ", kSharedPrefixStep);
    for (int64_t m = 0; m < group.num_members; ++m) {
      const int64_t place = group.members[m];
      STD_TORCH_CHECK(0 <= place && place < num_rows, "shared_members: place ", place, " is not in the batch");
      STD_TORCH_CHECK(*query_start.at(place + 1) - *query_start.at(place) == 1, "shared_members: place ", place,
                      " must have one query");
      STD_TORCH_CHECK(group.end < *seq_lens.at(place), "shared_groups: place ", place, " has no position of its own left");
      STD_TORCH_CHECK(own_begin_[place] == group.begin, "shared_groups: the groups of place ", place,
                      " must follow one another from position 0");
      own_begin_[place] = group.end;
    }
    levels_[level].push_back(group);
  }

  std::vector<SharedGroup> levels_[kMaxSharedLevels];
  std::vector<int64_t> own_begin_;  // by place; empty = no groups
};

}  // namespace toka
