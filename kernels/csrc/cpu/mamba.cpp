// Implicit attention of a Mamba-2 layer on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mean.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../checks.h"
#include "../sums.h"
#include "log_sums.h"
#include "products.h"

namespace hybridprune {
namespace {

// Visual tokens of a share of the softmax's first pass, visual tokens of a block of products and rows of it.
constexpr int64_t kShare = 4096, kBlock = 512, kRows = 4 * kRowPack;

struct Mamba {
  at::Tensor B, C, dt, log_decay;  // C: float32 [T, G, N] of the query rows; dt and log_decay as given, or undefined.
  int64_t groups, width, heads_of_group, samples;
  const int64_t *visual_index, *visual_offsets, *query_index, *query_offsets;
  Function function;

  Mamba(const at::Tensor& B_in, const at::Tensor& C_in, const std::optional<at::Tensor>& dt_in,
        const std::optional<at::Tensor>& log_decay_in, const at::Tensor& visual_index_, const at::Tensor& visual_offsets_,
        const at::Tensor& query_index_, const at::Tensor& query_offsets_, Function function_)
      : groups(0), width(0), heads_of_group(0), samples(0), function(function_) {
    check_mamba(B_in, C_in, dt_in, log_decay_in, visual_index_, visual_offsets_, query_index_, query_offsets_);
    for (const auto* t : {&visual_index_, &visual_offsets_, &query_index_, &query_offsets_}) {
      TORCH_CHECK((*t).is_contiguous(), "indices and offsets must be contiguous");
    }
    check_offsets(visual_offsets_, "visual_offsets", visual_index_.size(0));
    check_offsets(query_offsets_, "query_offsets", query_index_.size(0));
    check_index(visual_index_, "visual_index", B_in.size(0));
    check_index(query_index_, "query_index", B_in.size(0));
    B = B_in.contiguous();
    C = C_in.index_select(0, query_index_).to(at::kFloat).contiguous();
    if (dt_in) dt = dt_in->contiguous();
    if (log_decay_in) log_decay = log_decay_in->contiguous();
    groups = B.size(1);
    width = B.size(2);
    heads_of_group = mamba_heads(B, dt_in, log_decay_in) / groups;
    samples = visual_offsets_.size(0) - 1;
    visual_index = visual_index_.const_data_ptr<int64_t>();
    visual_offsets = visual_offsets_.const_data_ptr<int64_t>();
    query_index = query_index_.const_data_ptr<int64_t>();
    query_offsets = query_offsets_.const_data_ptr<int64_t>();
    for (int64_t sample = 0; sample < samples; ++sample) {
      TORCH_CHECK(std::is_sorted(visual_index + visual_offsets[sample], visual_index + visual_offsets[sample + 1]),
                  "visual_index falls within sample ", sample, ": expected it to rise");
      TORCH_CHECK(visual_offsets[sample] == visual_offsets[sample + 1] ||
                      query_offsets[sample] < query_offsets[sample + 1],
                  "sample ", sample, " has visual tokens and no query to score them by");
    }
  }

  int64_t queries(int64_t sample) const { return query_offsets[sample + 1] - query_offsets[sample]; }

  // Visual tokens among n from ``begin`` on that a row sees: with decay those before it.
  int64_t seen(int64_t begin, int64_t n, int64_t query) const {
    if (!log_decay.defined()) return n;
    const int64_t* index = visual_index + begin;
    return std::upper_bound(index, index + n, query_index[query]) - index;
  }
};

// What one thread needs for a block of a group's visual tokens. ``value_t``: double with decay, which spans hundreds of
// orders of magnitude, else float.
template <typename value_t>
class Block {
 public:
  static constexpr at::ScalarType kType = c10::CppTypeToScalarType<value_t>::value;

  explicit Block(const Mamba& mamba)
      : mamba_(mamba), keys_(at::empty({kBlock * mamba.width}, kType)), rows_(at::empty({kRows * mamba.width}, kType)),
        products_(at::empty({kRows, kBlock}, kType)), steps_(at::empty({mamba.heads_of_group, kBlock}, kType)),
        log_decay_(at::empty({mamba.log_decay.defined() ? mamba.heads_of_group : 0, kBlock}, at::kDouble)),
        row_(at::empty({kBlock}, kType)) {}

  // Calls visit(query, head of the group, values, n) for all rows of a sample: the first n places count, a multiple of
  // kKeyPack. Values are f(C . B) exp(a_i - a_j), for the softmax times dt_j; after the share's visual tokens and where a
  // row sees nothing they are 0, for the softmax -inf.
  template <typename Visit>
  void for_each_row(const Share& share, const Visit& visit) {
    const int64_t R = mamba_.heads_of_group, n = share.end - share.begin;
    load(share);
    const bool softmax = mamba_.function == Function::kSoftmax;
    for (int64_t query = mamba_.query_offsets[share.sample]; query < mamba_.query_offsets[share.sample + 1];) {
      const int64_t rows = std::min(kRows, mamba_.query_offsets[share.sample + 1] - query);
      value_t* product = multiply_rows(share, query, rows);
      for (const int64_t end = query + rows; query < end; ++query, product += kBlock) {
        const int64_t seen = mamba_.seen(share.begin, n, query);
        if (!mamba_.log_decay.defined() && !softmax) {
          // All heads weigh alike until dt comes; what is packed after the last token is 0.
          visit(query, 0, product, round_up(seen, kKeyPack));
          continue;
        }
        for (int64_t r = 0; r < R; ++r) {
          visit(query, r, weighted(product, share, query, r, seen, softmax), round_up(seen, kKeyPack));
        }
      }
    }
  }

  // [block] dt of a head of the group, ones where there is none.
  const value_t* steps(int64_t r) const { return steps_.const_data_ptr<value_t>() + r * kBlock; }

 private:
  // f(C . B) of some rows, kBlock apart.
  value_t* multiply_rows(const Share& share, int64_t query, int64_t rows) {
    const int64_t width = mamba_.width;
    value_t *packed = rows_.mutable_data_ptr<value_t>(), *out = products_.mutable_data_ptr<value_t>();
    const float* C = mamba_.C.const_data_ptr<float>() + (query * mamba_.groups + share.head) * width;
    pack<kRowPack>(packed, rows, width, [&](int64_t i) { return C + i * mamba_.groups * width; });
    multiply_packed(out, kBlock, packed, round_up(rows, kRowPack) / kRowPack, keys_.const_data_ptr<value_t>(),
                    round_up(share.end - share.begin, kKeyPack) / kKeyPack, width);
    if (mamba_.function == Function::kAbs) take_abs(out, rows * kBlock);
    if (mamba_.function == Function::kRelu) take_relu(out, rows * kBlock);
    return out;
  }

  const value_t* weighted(const value_t* product, const Share& share, int64_t query, int64_t r, int64_t seen,
                          bool softmax) {
    const int64_t counted = round_up(seen, kKeyPack);
    value_t* row = row_.mutable_data_ptr<value_t>();
    const value_t* values = product;
    if constexpr (std::is_same_v<value_t, double>) {
      const int64_t heads = mamba_.heads_of_group * mamba_.groups, head = share.head * mamba_.heads_of_group + r;
      const double own = mamba_.log_decay.template const_data_ptr<double>()[mamba_.query_index[query] * heads + head];
      decay_row(row, own, log_decay_.template const_data_ptr<double>() + r * kBlock, counted);
      multiply(row, row, product, counted);
      values = row;
    }
    if (softmax) multiply(row, values, steps(r), counted);
    std::fill(row + seen, row + counted, softmax ? kNegInf : value_t{0});
    return row;
  }

  void load(const Share& share) {
    const int64_t R = mamba_.heads_of_group, heads = R * mamba_.groups, n = share.end - share.begin;
    const int64_t* tokens = mamba_.visual_index + share.begin;
    if (mamba_.B.scalar_type() == at::kFloat) {
      load_keys<float>(tokens, n, share.head);
    } else {
      load_keys<c10::BFloat16>(tokens, n, share.head);
    }
    value_t* steps = steps_.mutable_data_ptr<value_t>();
    double* decay = log_decay_.mutable_data_ptr<double>();
    for (int64_t column = 0; column < round_up(n, kKeyPack); ++column) {
      // Places after the last token get its numbers: those of an earlier block might be NaN.
      const int64_t head = tokens[std::min(column, n - 1)] * heads + share.head * R;
      for (int64_t r = 0; r < R; ++r) {
        steps[r * kBlock + column] = mamba_.dt.defined() ? mamba_.dt.const_data_ptr<float>()[head + r] : 1.0f;
        if (mamba_.log_decay.defined()) {
          decay[r * kBlock + column] = mamba_.log_decay.const_data_ptr<double>()[head + r];
        }
      }
    }
  }

  template <typename scalar_t>
  void load_keys(const int64_t* tokens, int64_t n, int64_t group) {
    const scalar_t* B = mamba_.B.const_data_ptr<scalar_t>();
    pack<kKeyPack>(keys_.mutable_data_ptr<value_t>(), n, mamba_.width,
                   [&](int64_t j) { return B + (tokens[j] * mamba_.groups + group) * mamba_.width; });
  }

  const Mamba& mamba_;
  at::Tensor keys_, rows_, products_, steps_, log_decay_, row_;
};

// [T, H] log-sums of the softmax over visual tokens.
template <typename value_t>
at::Tensor softmax_log_sums(const Mamba& mamba) {
  const int64_t R = mamba.heads_of_group, heads = R * mamba.groups;
  const auto shares =
      shares_of(mamba.visual_offsets, mamba.query_offsets, mamba.samples, kShare, mamba.groups);
  std::vector<RowSums<value_t>> sums;
  sums.reserve(shares.size());
  for (const Share& share : shares) sums.emplace_back(mamba.queries(share.sample) * R);
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    Block<value_t> block(mamba);
    for (int64_t i = first; i < last; ++i) {
      const int64_t first_query = mamba.query_offsets[shares[i].sample];
      for (Share part = shares[i]; part.begin < shares[i].end; part.begin += kBlock) {
        part.end = std::min(part.begin + kBlock, shares[i].end);
        block.for_each_row(part, [&](int64_t query, int64_t r, const value_t* logits, int64_t n) {
          sums[i].add((query - first_query) * R + r, logits, n);
        });
      }
    }
  });
  const at::Tensor out = at::full({mamba.C.size(0), heads}, kNegInf, Block<value_t>::kType);
  value_t* values = out.mutable_data_ptr<value_t>();
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t first = mamba.query_offsets[shares[i].sample];
    for (int64_t row = 0; row < sums[i].rows(); ++row) {
      value_t& value = values[(first + row / R) * heads + shares[i].head * R + row % R];
      value = sums[i].joined(row, value);
    }
  }
  return out;
}

// Pools over the heads of a group what the products of one group come to, into out [n].
template <typename value_t>
void pool_heads(value_t* out, const value_t* columns, const Block<value_t>& block, const Mamba& mamba, int64_t n,
                Pooling pooling, bool one_column, int64_t queries) {
  const int64_t R = mamba.heads_of_group;
  const bool softmax = mamba.function == Function::kSoftmax;
  value_t value[kBlock];
  for (int64_t r = 0; r < R; ++r) {
    const value_t* column = columns + (one_column ? 0 : r * kBlock);
    if (softmax) {
      std::copy(column, column + n, value);
    } else {
      multiply(value, column, block.steps(r), n);
    }
    if (r == 0) {
      std::copy(value, value + n, out);
    } else if (pooling == Pooling::kMaxHeads) {
      take_max(out, value, n);
    } else {
      add(out, value, n);
    }
  }
  scale(out, n, value_t{1} / static_cast<value_t>(pooling == Pooling::kMaxHeads ? queries : queries * R));
}

at::Tensor pooled_groups(const at::Tensor& per_group, Pooling pooling) {
  if (pooling != Pooling::kMean) return per_group.amax(0);
  return at::div(sum_of_rows(per_group), static_cast<double>(per_group.size(0)));
}

// All variants that need products of every row with every visual token; their column sums are kept.
template <typename value_t>
at::Tensor from_products(const Mamba& mamba, Pooling pooling) {
  const int64_t R = mamba.heads_of_group, heads = R * mamba.groups;
  const int64_t num_visual = mamba.visual_offsets[mamba.samples];
  const bool softmax = mamba.function == Function::kSoftmax, one_column = !softmax && !mamba.log_decay.defined();
  const at::Tensor log_sums = softmax ? softmax_log_sums<value_t>(mamba) : at::Tensor();
  const value_t* row_sums = softmax ? log_sums.const_data_ptr<value_t>() : nullptr;
  const auto shares =
      shares_of(mamba.visual_offsets, mamba.query_offsets, mamba.samples, kBlock, mamba.groups);
  const at::Tensor out = at::empty({mamba.groups, num_visual}, Block<value_t>::kType);
  at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
    const at::NoGradGuard no_grad;
    Block<value_t> block(mamba);
    const at::Tensor columns = at::empty({R, kBlock}, Block<value_t>::kType);
    value_t* column = columns.mutable_data_ptr<value_t>();
    for (int64_t i = first; i < last; ++i) {
      const Share& share = shares[i];
      std::fill(column, column + R * kBlock, value_t{0});
      block.for_each_row(share, [&](int64_t query, int64_t r, const value_t* values, int64_t n) {
        if (softmax) {
          add_exp(column + r * kBlock, values, n, row_sums[query * heads + share.head * R + r]);
        } else {
          add(column + r * kBlock, values, n);
        }
      });
      pool_heads(out.mutable_data_ptr<value_t>() + share.head * num_visual + share.begin, column, block, mamba,
                 share.end - share.begin, pooling, one_column, mamba.queries(share.sample));
    }
  });
  return pooled_groups(out, pooling).to(at::kFloat);
}

// One token's score from its products with the mean of C [G], its steps [G, R] (null: ones) and their sums [G].
double pooled(const double* products, const float* steps, const double* sums, int64_t groups, int64_t R,
              Pooling pooling) {
  double best = kNegInf, sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const double in_group = products[g] * sums[g];
    sum += in_group;
    best = pooling == Pooling::kMaxGroups ? std::max(best, in_group / static_cast<double>(R)) : best;
    for (int64_t r = 0; pooling == Pooling::kMaxHeads && r < R; ++r) {
      best = std::max(best, products[g] * (steps ? steps[g * R + r] : 1.0f));
    }
  }
  return pooling == Pooling::kMean ? sum / static_cast<double>(groups * R) : best;
}

// float32 [G, N]: the mean of C over a sample's query rows.
at::Tensor mean_rows(const Mamba& mamba, int64_t sample) {
  return mamba.C.narrow(0, mamba.query_offsets[sample], mamba.queries(sample)).to(at::kDouble).mean(0).to(at::kFloat);
}

// Identity without decay: the mean of C first, then one pass over B, summed in float64 and rounded at the end, so that
// plain torch comes to the same bits. ``scalar_t``: float, or the bits of bfloat16.
template <typename scalar_t>
at::Tensor one_pass(const Mamba& mamba, Pooling pooling) {
  const int64_t G = mamba.groups, R = mamba.heads_of_group, width = mamba.width;
  const at::Tensor out = at::empty({mamba.visual_offsets[mamba.samples]}, at::kFloat);
  const auto* b = static_cast<const scalar_t*>(mamba.B.const_data_ptr());
  const float* steps = mamba.dt.defined() ? mamba.dt.const_data_ptr<float>() : nullptr;
  const std::vector<float> ones(R, 1.0f);
  for (int64_t sample = 0; sample < mamba.samples; ++sample) {
    if (mamba.queries(sample) == 0) continue;
    const at::Tensor mean = mean_rows(mamba, sample);
    const float* c = mean.const_data_ptr<float>();
    at::parallel_for(mamba.visual_offsets[sample], mamba.visual_offsets[sample + 1], 256, [&](int64_t begin, int64_t end) {
      std::vector<double> products(G), sums(G, static_cast<double>(R));
      for (int64_t j = begin; j < end; ++j) {
        const int64_t token = mamba.visual_index[j];
        const float* step = steps ? steps + token * G * R : nullptr;
        group_products(products.data(), b + token * G * width, c, width, G, width);
        if (step) group_products(sums.data(), step, ones.data(), 0, G, R);
        out.mutable_data_ptr<float>()[j] = static_cast<float>(pooled(products.data(), step, sums.data(), G, R, pooling));
      }
    });
  }
  return out;
}

// One token's score from what its heads [G, R] say.
double pooled_heads(const double* heads, int64_t groups, int64_t R, Pooling pooling) {
  double best = kNegInf, sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    double in_group = 0;
    for (int64_t r = 0; r < R; ++r) {
      const double value = heads[g * R + r];
      in_group += value;
      best = pooling == Pooling::kMaxHeads ? std::max(best, value) : best;
    }
    sum += in_group;
    best = pooling == Pooling::kMaxGroups ? std::max(best, in_group / static_cast<double>(R)) : best;
  }
  return pooling == Pooling::kMean ? sum / static_cast<double>(groups * R) : best;
}

// The same scores as ``one_pass`` before heads are pooled, each as its distance from its head's mean over the sample's
// visual tokens in standard deviations: one pass over B for the moments, one to measure. Moments are of differences from
// the sample's first token, as in plain torch, summed in blocks of their own so that threads change no bit.
template <typename scalar_t>
class Contrast {
 public:
  Contrast(const Mamba& mamba, const float* mean_c, int64_t sample)
      : mamba_(mamba), mean_c_(mean_c), begin_(mamba.visual_offsets[sample]), end_(mamba.visual_offsets[sample + 1]),
        heads_(mamba.groups * mamba.heads_of_group), first_(heads_), centre_(heads_), scale_(heads_) {}

  void find_moments() {
    std::vector<double> products(mamba_.groups);
    score(first_.data(), products.data(), begin_);
    const int64_t blocks = (end_ - begin_ + kTokens - 1) / kTokens;
    // Sums and sums of squares of every block.
    std::vector<double> sums(blocks * 2 * heads_, 0.0);
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      std::vector<double> scores(heads_), own_products(mamba_.groups);
      for (int64_t block = first; block < last; ++block) {
        double* total = sums.data() + block * 2 * heads_;
        const int64_t stop = std::min(begin_ + (block + 1) * kTokens, end_);
        for (int64_t j = begin_ + block * kTokens; j < stop; ++j) {
          score(scores.data(), own_products.data(), j);
          add_gaps(total, total + heads_, scores.data(), first_.data(), heads_);
        }
      }
    });
    for (int64_t block = 1; block < blocks; ++block) add(sums.data(), sums.data() + block * 2 * heads_, 2 * heads_);
    const double count = static_cast<double>(end_ - begin_);
    for (int64_t h = 0; h < heads_; ++h) {
      const double mean = sums[h] / count, variance = sums[heads_ + h] / count - mean * mean;
      centre_[h] = first_[h] + mean;
      // A head that scores all tokens alike says 0 of each.
      scale_[h] = variance > 0 ? 1 / std::sqrt(variance) : 0;
    }
  }

  void measure(float* out, Pooling pooling) const {
    at::parallel_for(begin_, end_, kTokens, [&](int64_t first, int64_t last) {
      std::vector<double> scores(heads_), products(mamba_.groups);
      for (int64_t j = first; j < last; ++j) {
        score(scores.data(), products.data(), j);
        contrast(scores.data(), centre_.data(), scale_.data(), heads_);
        out[j] = static_cast<float>(pooled_heads(scores.data(), mamba_.groups, mamba_.heads_of_group, pooling));
      }
    });
  }

 private:
  static constexpr int64_t kTokens = 256;

  // [G, R] signed scores of a visual token.
  void score(double* out, double* products, int64_t j) const {
    const int64_t G = mamba_.groups, R = mamba_.heads_of_group, width = mamba_.width, token = mamba_.visual_index[j];
    const auto* b = static_cast<const scalar_t*>(mamba_.B.const_data_ptr()) + token * G * width;
    group_products(products, b, mean_c_, width, G, width);
    const float* steps = mamba_.dt.defined() ? mamba_.dt.const_data_ptr<float>() + token * heads_ : nullptr;
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t r = 0; r < R; ++r) out[g * R + r] = products[g] * (steps ? steps[g * R + r] : 1.0f);
    }
  }

  const Mamba& mamba_;
  const float* mean_c_;
  int64_t begin_, end_, heads_;
  std::vector<double> first_, centre_, scale_;
};

template <typename scalar_t>
at::Tensor contrasted(const Mamba& mamba, Pooling pooling) {
  const at::Tensor out = at::empty({mamba.visual_offsets[mamba.samples]}, at::kFloat);
  for (int64_t sample = 0; sample < mamba.samples; ++sample) {
    if (mamba.queries(sample) == 0 || mamba.visual_offsets[sample] == mamba.visual_offsets[sample + 1]) continue;
    const at::Tensor mean = mean_rows(mamba, sample);
    Contrast<scalar_t> contrast(mamba, mean.const_data_ptr<float>(), sample);
    contrast.find_moments();
    contrast.measure(out.mutable_data_ptr<float>(), pooling);
  }
  return out;
}

at::Tensor mamba_score(const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& dt,
                       const std::optional<at::Tensor>& log_decay, const at::Tensor& visual_index,
                       const at::Tensor& visual_offsets, const at::Tensor& query_index, const at::Tensor& query_offsets,
                       c10::string_view function, bool contrast, c10::string_view pooling) {
  const at::NoGradGuard no_grad;
  const Pooling pool = mamba_pooling_of(pooling);
  check_contrast(contrast, function, log_decay);
  const Mamba mamba(B, C, dt, log_decay, visual_index, visual_offsets, query_index, query_offsets,
                    function_of(function));
  if (log_decay) return from_products<double>(mamba, pool);
  if (mamba.function != Function::kIdentity) return from_products<float>(mamba, pool);
  const bool wide = B.scalar_type() == at::kFloat;
  if (contrast) return wide ? contrasted<float>(mamba, pool) : contrasted<uint16_t>(mamba, pool);
  return wide ? one_pass<float>(mamba, pool) : one_pass<uint16_t>(mamba, pool);
}

}  // namespace
}  // namespace hybridprune

TORCH_LIBRARY_IMPL(hybridprune, CPU, m) { m.impl("mamba_score", TORCH_FN(hybridprune::mamba_score)); }
