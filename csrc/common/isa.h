// Which instruction set the CPU kernels use. Every file under csrc/*/ whose name ends in _cpu.cpp is compiled once per
// instruction set, in a namespace of that name (FASTPROTO_ISA); the choice falls at run time. What few instructions beyond
// AVX2 and AVX-512's core are worth having (VNNI's integer products, bfloat16's) stand as assembly behind has_vnni and
// has_bf16, AMX's products of tiles behind has_amx.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
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

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx2_vnni: return "avx2_vnni";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

// Whether this CPU has AMX with bfloat16 and 8-bit integers, and Linux lets this process use it. It does not where a thread has
// a stack for signals too small for the tiles (8 KB, SIGSTKSZ of old), and refuses such stacks from then on.
inline bool take_amx() {
#if FASTPROTO_AMX
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, needed = bf16 | tile | int8;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & needed) != needed) return false;
  constexpr long ask_for_feature = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ask_for_feature, tile_data) == 0;
#else
  return false;
#endif
}

// From the narrowest to the widest that this CPU has. baseline is x86-64-v2, or whatever the platform's compiler targets.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    isas.push_back(Isa::avx2);
    unsigned eax = 0, ebx, ecx, edx;
    if (FASTPROTO_AVX_VNNI && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1) isas.push_back(Isa::avx2_vnni);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
      isas.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512vnni")) {
        isas.push_back(Isa::avx512_vnni);
        if (__builtin_cpu_supports("avx512bf16")) {
          isas.push_back(Isa::avx512_bf16);
          if (take_amx()) isas.push_back(Isa::amx);
        }
      }
    }
  }
#endif
  return isas;
}

// The widest but for one: vdpbf16ps does two products where an FMA does one, and on AMD's cores issues as often, but on Intel's
// (Emerald Rapids) every 2.2 cycles where two FMAs issue in each. There bfloat16 is faster widened.
inline Isa fastest_isa() {
  const Isa widest = supported_isas().back();
#if defined(__x86_64__)
  if (widest == Isa::avx512_bf16 && __builtin_cpu_is("intel")) return Isa::avx512_vnni;
#endif
  return widest;
}

// The one in use: the fastest, unless set_isa asked for another.
inline Isa& current_isa() {
  static Isa isa = fastest_isa();
  return isa;
}

inline bool has_vnni() { return current_isa() == Isa::avx2_vnni || current_isa() >= Isa::avx512_vnni; }
inline bool has_bf16() { return current_isa() >= Isa::avx512_bf16; }
inline bool has_amx() { return current_isa() == Isa::amx; }

inline void set_isa(const std::string& name) {
  for (Isa isa : supported_isas()) {
    if (name == isa_name(isa)) {
      current_isa() = isa;
      return;
    }
  }
  throw std::invalid_argument("isa: name expected an instruction set of this CPU, got '" + name + "'");
}

}  // namespace fastproto

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
