// The functions for 64-bit ARM processors that add up four products of whole numbers at once (ARMv8.2's "dotprod").

#if defined(__aarch64__) || defined(EMULATED)

#ifndef EMULATED
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define DOT_PRODUCTS
#include "neon.inl"

const polyformer::Kernels polyformer::neon_dot_kernels = KERNELS("NEON with dot products");

#ifndef EMULATED
#pragma GCC pop_options
#endif

#endif
