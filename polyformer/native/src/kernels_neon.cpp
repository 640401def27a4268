// The functions for any 64-bit ARM processor.

#if defined(__aarch64__) || defined(EMULATED)

#include "neon.inl"

const polyformer::Kernels polyformer::neon_kernels = KERNELS("NEON");

#endif
