// Row log-sums over keys that come in blocks: every task keeps a maximum and a sum a row for its own share of the keys,
// and the shares are joined at the end. Shares depend on the sizes alone, so the result does not on the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <vector>

#include "vector.h"

namespace hybridprune {

// Keys [begin, end) of one sample, for one head of the keys (or group).
struct Share {
  int64_t sample, begin, end, head;
};

// Every sample's range of keys in shares of at most ``size``, for each of some heads.
inline std::vector<Share> shares_of(const int64_t* key_offsets, const int64_t* query_offsets, int64_t samples,
                                    int64_t size, int64_t heads) {
  std::vector<Share> shares;
  for (int64_t sample = 0; sample < samples; ++sample) {
    // Nobody asks, so nothing is scored.
    if (query_offsets[sample] == query_offsets[sample + 1]) continue;
    for (int64_t begin = key_offsets[sample]; begin < key_offsets[sample + 1]; begin += size) {
      const int64_t end = std::min(begin + size, key_offsets[sample + 1]);
      for (int64_t head = 0; head < heads; ++head) shares.push_back({sample, begin, end, head});
    }
  }
  return shares;
}

// Maximum and sum of the rows of one share, [T of the sample, heads of a group] each.
template <typename value_t>
class RowSums {
 public:
  explicit RowSums(int64_t rows)
      : values_(at::full({2, rows}, kNegInf, c10::CppTypeToScalarType<value_t>::value)), rows_(rows),
        max_(values_.template mutable_data_ptr<value_t>()), sum_(max_ + rows) {}

  // Takes in n more logits of a row.
  void add(int64_t row, const value_t* logits, int64_t n) {
    const value_t best = row_max(logits, n);
    if (best == kNegInf) return;
    if (max_[row] == kNegInf) {
      max_[row] = best;
      sum_[row] = 0;
    }
    if (best > max_[row]) {
      sum_[row] *= fast_exp(max_[row] - best);
      max_[row] = best;
    }
    sum_[row] += sum_exp(logits, n, max_[row]);
  }

  // Joins with what an output holds: out_row = log(exp(out_row) + sum_row exp(max_row)).
  value_t joined(int64_t row, value_t out) const {
    if (max_[row] == kNegInf) return out;
    const value_t own = max_[row] + std::log(sum_[row]);
    if (out == kNegInf) return own;
    const value_t high = std::max(own, out);
    return high + std::log(std::exp(own - high) + std::exp(out - high));
  }

  int64_t rows() const { return rows_; }

 private:
  at::Tensor values_;
  int64_t rows_;
  value_t* max_;
  value_t* sum_;
};

}  // namespace hybridprune
