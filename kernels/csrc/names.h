// The functions and poolings of Mamba scores, by what the schema calls them in checks.h.
#pragma once

namespace hybridprune {

enum class Function { kIdentity, kAbs, kRelu, kSoftmax };
enum class Pooling { kMean, kMaxGroups, kMaxHeads };

}  // namespace hybridprune
