#pragma once
#include <cstdint>

namespace rmc {

// How many red zones were written to since the last call; those that there are by now are forgotten. Their memory has
// to exist still.
int64_t touched();

}  // namespace rmc
