// The product of operand tiles that a file is compiled for: a file of csrc/isa/ names its header as RMC_PRODUCT.
#pragma once
#include RMC_PRODUCT
