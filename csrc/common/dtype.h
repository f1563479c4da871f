// Element types that cross from Python by number, and their conversion from float.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace fastproto {

// Same numbers as DTYPE_CODES in fastproto/ops/_dispatch.py.
enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <typename T> inline T from_float(float x) { return static_cast<T>(x); }

template <> inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};  // NaN stays NaN
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // round to nearest, ties to even
}

// By integer arithmetic, since not every compiler has _Float16. Ties to even, subnormals and overflow as IEEE 754 says.
template <> inline Half from_float<Half>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (u < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal, rounded, in the low bits of the sum
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    std::memcpy(&u, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (u - 0x3f000000u))};
  }
  u += 0xc8000fffu + ((u >> 13) & 1);  // exponent bias 127 to 15, and round
  return {static_cast<uint16_t>(sign | (u >> 13))};
}

inline float to_float(BFloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &u, 4);
  return out;
}

// Exact. A half's bits, moved to a float's place, are 2^-112 times its value; infinity and NaN keep their exponent.
inline float to_float(Half x) {
  uint32_t u = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (u >= 0x0f800000u) u |= 0x70000000u;
  float out;
  std::memcpy(&out, &u, 4);
  if (u < 0x0f800000u) out *= 0x1p112f;
  return x.bits & 0x8000 ? -out : out;
}

// Calls f with a value of the C++ type that a dtype number stands for.
template <typename F> inline void with_dtype(int dtype, F&& f) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: f(float{}); return;
    case Dtype::float64: f(double{}); return;
    case Dtype::float16: f(Half{}); return;
    case Dtype::bfloat16: f(BFloat16{}); return;
  }
  throw std::invalid_argument("unknown dtype number");
}

}  // namespace fastproto
