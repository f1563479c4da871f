// What the check of an index reads of it, in one pass: torch takes two for as much, and a count of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fastproto {

// Lowest and highest entry, with 0 for those that are ignored, and how many are not. count ≥ 1.
template <typename T>
std::tuple<int64_t, int64_t, int64_t> index_range(const T* index, int64_t count, int64_t stride, int64_t ignored) {
  const auto entry = [&](int64_t i) { return index[i * stride] == ignored ? T{0} : index[i * stride]; };
  T low = entry(0), high = low;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, entry(i)), high = std::max(high, entry(i));
    counted += index[i * stride] != ignored;
  }
  return {low, high, counted};
}

// The check of Python does not run in compiled code, and an index too high would be an address of something else.
inline void expect_below(const int64_t* index, int64_t count, int64_t size, const char* argument) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] >= size)
      throw std::invalid_argument(std::string(argument) + " expected below " + std::to_string(size) + ", got " +
                                  std::to_string(index[i]));
}

}  // namespace fastproto
