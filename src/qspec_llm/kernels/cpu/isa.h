// Which kernels run: the best that the machine has, or one that was asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace qspec {

std::vector<std::string> available_isas();  // best first
const Kernels& kernels();
void set_isa(const std::string& name);  // throws Error where the machine lacks it

}  // namespace qspec
