// Rows of any dtype as rows of floats, what is computed of one, and memory for them.
// Included by *_cpu.cpp only, inside whose instruction set it lives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#include "dtype.h"
#include "vec.h"

namespace fastproto {
namespace FASTPROTO_ISA {

// A row of `size` numbers of any dtype as floats.
inline void load_row(const void* data, int dtype, int64_t offset, int64_t size, float* out) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: std::memcpy(out, static_cast<const float*>(data) + offset, size * sizeof(float)); break;
    case Dtype::float16: {
      const Half* row = static_cast<const Half*>(data) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = to_float(row[i]);
      break;
    }
    case Dtype::bfloat16: {
      const BFloat16* row = static_cast<const BFloat16*>(data) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = to_float(row[i]);
      break;
    }
    default: throw std::invalid_argument("float64 is for the reference");
  }
}

// Such a row where it lies, or from `out` if it has to be widened. A copy read at once would wait for its stores.
inline const float* read_row(const void* data, int dtype, int64_t offset, int64_t size, float* out) {
  if (static_cast<Dtype>(dtype) == Dtype::float32) return static_cast<const float*>(data) + offset;
  load_row(data, dtype, offset, size, out);
  return out;
}

// Memory that starts at a cache line: a vector that crosses two costs two loads.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  // At least `size` floats of any value.
  float* take(int64_t size) {
    if (size > size_) {
      release();
      data_ = static_cast<float*>(::operator new(size * sizeof(float), ALIGNMENT));
      size_ = size;
    }
    return data_;
  }
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  void release() {
    if (data_) ::operator delete(data_, ALIGNMENT);
    data_ = nullptr, size_ = 0;
  }
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline float dot(const float* a, const float* b, int64_t size) {
  Vec total{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) total += load(a + i) * load(b + i);
  float rest = sum(total);
  for (; i < size; ++i) rest += a[i] * b[i];
  return rest;
}
// 1 / |row|; of shorter rows than SHORTEST_UNIT 1 / that, as in PyTorch's normalize, which leaves a zero row zero.
constexpr float SHORTEST_UNIT = 1e-12f;
inline float inverse_length(const float* row, int64_t size) {
  return 1.f / std::max(std::sqrt(dot(row, row, size)), SHORTEST_UNIT);
}
// out = row · factor; out may be the row.
inline void scale_row(const float* row, int64_t size, float factor, float* out) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(out + i, load(row + i) * factor);
  for (; i < size; ++i) out[i] = row[i] * factor;
}

}  // namespace FASTPROTO_ISA
}  // namespace fastproto
