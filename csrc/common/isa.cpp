// Which of the instruction sets this CPU has, and which one is in use.
#include "isa.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastproto {
namespace {

// Whether this CPU has AMX with bfloat16 and 8-bit integers, and Linux lets this process use it. It does not where a thread has
// a stack for signals too small for the tiles (8 KB, SIGSTKSZ of old), and refuses such stacks from then on.
bool take_amx() {
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

// The widest but for one: vdpbf16ps does two products where an FMA does one, and on AMD's cores issues as often, but on Intel's
// (Emerald Rapids) every 2.2 cycles where two FMAs issue in each. There bfloat16 is faster widened.
Isa fastest_isa() {
  const Isa widest = supported_isas().back();
#if defined(__x86_64__)
  if (widest == Isa::avx512_bf16 && __builtin_cpu_is("intel")) return Isa::avx512_vnni;
#endif
  return widest;
}

Isa& chosen_isa() {
  static Isa isa = fastest_isa();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
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

std::vector<Isa> supported_isas() {
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

Isa current_isa() { return chosen_isa(); }

void set_isa(const char* name) {
  for (Isa isa : supported_isas()) {
    if (name == std::string(isa_name(isa))) {
      chosen_isa() = isa;
      return;
    }
  }
  throw std::invalid_argument(std::string("isa: name expected an instruction set of this CPU, got '") + name + "'");
}

}  // namespace fastproto
