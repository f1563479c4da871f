// Which instruction set the CPU kernels use. Every file under csrc/*/ whose name ends in _cpu.cpp is compiled once per
// instruction set, in a namespace of that name (FASTPROTO_ISA); the choice falls at run time. What few instructions beyond
// AVX2 and AVX-512's core are worth having (VNNI's integer products, bfloat16's) stand as assembly behind has_vnni and
// has_bf16, AMX's products of tiles behind has_amx.
#pragma once

#include <vector>

namespace fastproto {

// The assemblers beside GCC 12 and clang 12 know the VNNI of CPUs without AVX-512.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ : __GNUC__) >= 12
#define FASTPROTO_AVX_VNNI 1
#else
#define FASTPROTO_AVX_VNNI 0
#endif

// Linux asks a process to say that it wants AMX's tiles; assemblers know them since 2020.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ : __GNUC__) >= 11
#define FASTPROTO_AMX 1
#else
#define FASTPROTO_AMX 0
#endif

enum class Isa { baseline, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, amx };

const char* isa_name(Isa isa);

// From the narrowest to the widest that this CPU has. baseline is x86-64-v2, or whatever the platform's compiler targets.
std::vector<Isa> supported_isas();

// The one in use: the fastest of this CPU, unless set_isa asked for another by its name.
Isa current_isa();
void set_isa(const char* name);

inline bool has_vnni() { return current_isa() == Isa::avx2_vnni || current_isa() >= Isa::avx512_vnni; }
inline bool has_bf16() { return current_isa() >= Isa::avx512_bf16; }
inline bool has_amx() { return current_isa() == Isa::amx; }

}  // namespace fastproto

// Declares what every instruction set has one of.
#define FASTPROTO_PER_ISA(...)        \
  namespace baseline { __VA_ARGS__ }  \
  namespace avx2 { __VA_ARGS__ }      \
  namespace avx512 { __VA_ARGS__ }

// Calls FUNCTION from the namespace of the instruction set in use, and assigns what it returns.
#if defined(__x86_64__)
#define FASTPROTO_DISPATCH_TO(RESULT, FUNCTION, ...)                                         \
  switch (::fastproto::current_isa()) {                                                      \
    case ::fastproto::Isa::amx:                                                              \
    case ::fastproto::Isa::avx512_bf16:                                                      \
    case ::fastproto::Isa::avx512_vnni:                                                      \
    case ::fastproto::Isa::avx512: RESULT ::fastproto::avx512::FUNCTION(__VA_ARGS__); break; \
    case ::fastproto::Isa::avx2_vnni:                                                        \
    case ::fastproto::Isa::avx2: RESULT ::fastproto::avx2::FUNCTION(__VA_ARGS__); break;     \
    default: RESULT ::fastproto::baseline::FUNCTION(__VA_ARGS__);                            \
  }
#else
#define FASTPROTO_DISPATCH_TO(RESULT, FUNCTION, ...) RESULT ::fastproto::baseline::FUNCTION(__VA_ARGS__)
#endif
#define FASTPROTO_DISPATCH(FUNCTION, ...) FASTPROTO_DISPATCH_TO(, FUNCTION, __VA_ARGS__)
