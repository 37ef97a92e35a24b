// Attention scores on the CPU: blocks of logits, everything after them in vector loops.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "log_sums.h"
#include "products.h"

namespace hybridprune {
namespace {

// Keys of a share of the first pass, keys of a block of logits and rows of it: a block and its keys fit a core's cache.
constexpr int64_t kShare = 4096, kBlock = 512, kRows = 4 * kRowPack;

struct Attention {
  at::Tensor k, rows;  // k: [J, K, E]; rows: q, scaled and packed: float32 [K, packs of rows, E * kRowPack].
  std::vector<int64_t> first_pack;  // of the rows of every sample
  int64_t heads_of_key;
  const int64_t *query_positions, *key_positions, *query_offsets, *key_offsets;
  const bool* always_seen;
  int64_t samples;

  Attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& query_positions_,
            const at::Tensor& key_positions_, const std::optional<at::Tensor>& always_seen_,
            const at::Tensor& query_offsets_, const at::Tensor& key_offsets_) {
    check_attention(q_in, k_in, query_positions_, key_positions_, always_seen_, query_offsets_, key_offsets_);
    for (const auto* t : {&query_positions_, &key_positions_, &query_offsets_, &key_offsets_}) {
      TORCH_CHECK((*t).is_contiguous(), "positions and offsets must be contiguous");
    }
    TORCH_CHECK(!always_seen_ || always_seen_->is_contiguous(), "always_seen must be contiguous");
    check_offsets(query_offsets_, "query_offsets", q_in.size(0));
    check_offsets(key_offsets_, "key_offsets", k_in.size(0));
    const int64_t key_heads = k_in.size(1);
    heads_of_key = q_in.size(1) / key_heads;
    k = k_in.contiguous();
    query_positions = query_positions_.const_data_ptr<int64_t>();
    key_positions = key_positions_.const_data_ptr<int64_t>();
    query_offsets = query_offsets_.const_data_ptr<int64_t>();
    key_offsets = key_offsets_.const_data_ptr<int64_t>();
    always_seen = always_seen_ ? always_seen_->const_data_ptr<bool>() : nullptr;
    samples = query_offsets_.size(0) - 1;
    const int64_t* end = key_positions + k.size(0);
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t *first = key_positions + key_offsets[sample], *last = key_positions + key_offsets[sample + 1];
      TORCH_CHECK(last <= end && std::is_sorted(first, last), "key_positions falls within sample ", sample,
                  ": expected them to rise");
    }
    pack_rows(q_in.to(at::kFloat).mul(1.0 / std::sqrt(static_cast<double>(q_in.size(2)))).contiguous());
  }

  int64_t num_rows(int64_t sample) const { return (query_offsets[sample + 1] - query_offsets[sample]) * heads_of_key; }

  // Calls visit(row of the sample times R plus head, logits, n) for every row of a sample and every block of its keys
  // [begin, end): the first n logits count, what a row does not see among them is -inf; n is a multiple of kKeyPack.
  template <typename Visit>
  void for_each_row(const Share& share, const Visit& visit) const {
    const int64_t width = k.size(2), R = heads_of_key, count = num_rows(share.sample);
    const at::Tensor keys = at::empty({kBlock * width}, at::kFloat), logits = at::empty({kRows * kBlock}, at::kFloat);
    const float* packed = rows.const_data_ptr<float>() +
                          (share.head * rows.size(1) + first_pack[share.sample]) * kRowPack * width;
    for (int64_t begin = share.begin; begin < share.end; begin += kBlock) {
      const int64_t n = std::min(kBlock, share.end - begin);
      if (k.scalar_type() == at::kFloat) {
        load<float>(keys.mutable_data_ptr<float>(), begin, n, share.head);
      } else {
        load<c10::BFloat16>(keys.mutable_data_ptr<float>(), begin, n, share.head);
      }
      for (int64_t row = 0; row < count; row += kRows) {
        const int64_t some = std::min(kRows, count - row);
        float* values = logits.mutable_data_ptr<float>();
        multiply_packed(values, kBlock, packed + row * width, round_up(some, kRowPack) / kRowPack,
                        keys.const_data_ptr<float>(), round_up(n, kKeyPack) / kKeyPack, width);
        for (int64_t i = 0; i < some; ++i, values += kBlock) {
          const int64_t position = query_positions[query_offsets[share.sample] + (row + i) / R];
          visit(row + i, values, hide(values, begin, n, position));
        }
      }
    }
  }

 private:
  void pack_rows(const at::Tensor& q) {
    const int64_t R = heads_of_key, key_heads = k.size(1), width = k.size(2);
    first_pack = {0};
    for (int64_t sample = 0; sample < samples; ++sample) {
      first_pack.push_back(first_pack.back() + round_up(num_rows(sample), kRowPack) / kRowPack);
    }
    rows = at::empty({key_heads, first_pack.back(), width * kRowPack}, at::kFloat);
    const float* from = q.const_data_ptr<float>();
    for (int64_t head = 0; head < key_heads; ++head) {
      for (int64_t sample = 0; sample < samples; ++sample) {
        float* out = rows.mutable_data_ptr<float>() + (head * rows.size(1) + first_pack[sample]) * kRowPack * width;
        const float* first = from + (query_offsets[sample] * key_heads + head) * R * width;
        pack<kRowPack>(out, num_rows(sample), width,
                       [&](int64_t row) { return first + (row / R * key_heads * R + row % R) * width; });
      }
    }
  }

  template <typename scalar_t>
  void load(float* out, int64_t begin, int64_t n, int64_t head) const {
    const int64_t stride = k.size(1) * k.size(2);
    const scalar_t* first = k.const_data_ptr<scalar_t>() + begin * stride + head * k.size(2);
    pack<kKeyPack>(out, n, k.size(2), [&](int64_t j) { return first + j * stride; });
  }

  // How many of n logits of a row count; those that the row does not see become -inf. Positions rise, so what comes
  // after the row is the end of the block.
  int64_t hide(float* logits, int64_t begin, int64_t n, int64_t position) const {
    const int64_t* keys = key_positions + begin;
    int64_t seen = std::upper_bound(keys, keys + n, position) - keys;
    if (always_seen != nullptr) {
      for (; seen < n; ++seen) logits[seen] = always_seen[begin + seen] ? logits[seen] : kNegInf;
    }
    const int64_t counted = round_up(seen, kKeyPack);
    std::fill(logits + seen, logits + counted, kNegInf);
    return counted;
  }
};

at::Tensor attention_log_sum(const at::Tensor& q, const at::Tensor& k, const at::Tensor& query_positions,
                             const at::Tensor& key_positions, const std::optional<at::Tensor>& always_seen,
                             const at::Tensor& query_offsets, const at::Tensor& key_offsets) {
  const at::NoGradGuard no_grad;
  const Attention attention(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  const int64_t heads = q.size(1), R = attention.heads_of_key;
  const auto shares =
      shares_of(attention.key_offsets, attention.query_offsets, attention.samples, kShare, k.size(1));
  std::vector<RowSums<float>> sums;
  sums.reserve(shares.size());
  for (const Share& share : shares) sums.emplace_back(attention.num_rows(share.sample));
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad_here;
    for (int64_t i = first; i < last; ++i) {
      attention.for_each_row(shares[i], [&](int64_t row, const float* logits, int64_t n) { sums[i].add(row, logits, n); });
    }
  });
  const at::Tensor out = at::full({q.size(0), heads}, kNegInf, at::kFloat);
  float* values = out.mutable_data_ptr<float>();
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t first = attention.query_offsets[shares[i].sample];
    for (int64_t row = 0; row < sums[i].rows(); ++row) {
      float& value = values[(first + row / R) * heads + shares[i].head * R + row % R];
      value = sums[i].joined(row, value);
    }
  }
  return out;
}

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& log_sum,
                          const at::Tensor& query_positions, const at::Tensor& key_positions,
                          const std::optional<at::Tensor>& always_seen, const at::Tensor& query_offsets,
                          const at::Tensor& key_offsets, c10::string_view pooling) {
  const at::NoGradGuard no_grad;
  const bool by_max = pools_by_max(pooling);
  const Attention attention(q, k, query_positions, key_positions, always_seen, query_offsets, key_offsets);
  check_log_sum(log_sum, q);
  const at::Tensor sums = log_sum.contiguous();
  const float* row_sums = sums.const_data_ptr<float>();
  const int64_t heads = q.size(1), R = attention.heads_of_key, key_heads = k.size(1);
  const auto blocks = shares_of(attention.key_offsets, attention.query_offsets, attention.samples, kBlock, 1);
  const at::Tensor out = at::zeros({k.size(0)}, at::kFloat);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad_here;
    const at::Tensor columns = at::empty({R, kBlock}, at::kFloat);
    float* column = columns.mutable_data_ptr<float>();
    for (int64_t i = first; i < last; ++i) {
      Share block = blocks[i];
      const int64_t n = block.end - block.begin, first_query = attention.query_offsets[block.sample];
      const int64_t queries = attention.query_offsets[block.sample + 1] - first_query;
      float* scores = out.mutable_data_ptr<float>() + block.begin;
      for (block.head = 0; block.head < key_heads; ++block.head) {
        std::fill(column, column + R * kBlock, 0.0f);
        attention.for_each_row(block, [&](int64_t row, const float* logits, int64_t count) {
          const int64_t head = block.head * R + row % R;
          add_exp(column + row % R * kBlock, logits, count, row_sums[(first_query + row / R) * heads + head]);
        });
        for (int64_t r = 0; r < R; ++r) {
          by_max ? take_max(scores, column + r * kBlock, n) : add(scores, column + r * kBlock, n);
        }
      }
      scale(scores, n, 1.0f / static_cast<float>(by_max ? queries : queries * heads));
    }
  });
  return out;
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) {
  m.impl("attention_log_sum", TORCH_FN(hybridprune::attention_log_sum));
  m.impl("attention_mass", TORCH_FN(hybridprune::attention_mass));
}
