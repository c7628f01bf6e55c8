#include "isa.h"

namespace qspec {
namespace {

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found;
#ifdef QSPEC_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (has_avx512) found.push_back(&kAvx512);
  if (has_avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kGeneric);
  return found;
}

const std::vector<const Kernels*>& all() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const Kernels*& current() {
  static const Kernels* chosen = all().front();
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* one : all()) names.emplace_back(one->name);
  return names;
}

const Kernels& kernels() { return *current(); }

void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* one : all()) {
    if (name == one->name) {
      current() = one;
      return;
    }
    known += known.empty() ? one->name : std::string(", ") + one->name;
  }
  throw Error("this machine has no kernels for '" + name + "'; it can run " + known);
}

}  // namespace qspec
