// How many rows a thread takes at least.
#pragma once

#include <algorithm>
#include <cstdint>

namespace hybridprune {

// Rows of about 64 KiB together are worth a thread.
inline int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes)); }

}  // namespace hybridprune
