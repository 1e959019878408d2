#include "common/profile.h"

namespace rmc {

Profile& profile() {
  static Profile instance;
  return instance;
}

}  // namespace rmc
