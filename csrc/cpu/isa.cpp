// Selection of the instruction set, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace emd::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef EMD_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Candidate {
  const Kernels* table;
  bool runs_here;
};

// Candidates, slowest first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all = {{&baseline::table, true}};
#ifdef EMD_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  all.push_back({&avx2::table, avx2});
  all.push_back({&avx512::table, avx512});
#endif
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("EMD_FAST_ISA");
  const Kernels* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    const bool named = wanted && *wanted && std::string(wanted) == candidate.table->isa;
    if (named && !candidate.runs_here) {
      throw std::runtime_error("EMD_FAST_ISA=" + std::string(wanted) + ": this machine cannot run it");
    }
    if (named) return *candidate.table;
    if (candidate.runs_here) best = candidate.table;
  }
  if (wanted && *wanted) {
    std::string names;
    for (const std::string& name : isas_built()) names += (names.empty() ? "" : ", ") + name;
    throw std::runtime_error("EMD_FAST_ISA must be one of " + names + ", got " + wanted);
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.table->isa);
  return names;
}

}  // namespace emd::cpu
