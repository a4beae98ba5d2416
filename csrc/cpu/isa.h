#pragma once

#include <string>
#include <vector>

namespace emd::cpu {

// Names of the instruction sets that the kernels were compiled for, slowest first.
std::vector<std::string> isas_built();

}  // namespace emd::cpu
