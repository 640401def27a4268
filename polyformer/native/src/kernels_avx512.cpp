// The functions for x86 processors with AVX-512 and its products of whole numbers (VNNI).

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

// Where these instructions are emulated, for tests, the rest must not be compiled for them.
#ifndef EMULATED
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#endif

#include "vectors.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

INLINE __m512i four_everywhere(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// 128 times the sum of 32 whole numbers.
INLINE int32_t raised(const int8_t* x) {
    const __m256i some = _mm256_loadu_si256((const __m256i*)x);
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8((char)128), some);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Products of 16 rows × 32 columns of codes with whole numbers of T rows of x. The processor multiplies numbers without a
// sign with others that have one: 8-bit codes are raised by 128 first, and what that adds is taken away again.
template <int BITS, int T>
INLINE void dots(const uint8_t* codes, const int8_t* x, int64_t width, i8x (&sum)[T][2]) {
    const __m512i below = _mm512_set1_epi8(15), raise = _mm512_set1_epi8((char)128);
    __m512i total[T];
    for (int t = 0; t < T; ++t) total[t] = BITS == 4 ? _mm512_setzero_si512() : _mm512_set1_epi32(-raised(x + t * width));
#pragma GCC unroll 8
    for (int chunk = 0; chunk < BITS; ++chunk) {
        const __m512i found = _mm512_loadu_si512((const void*)(codes + chunk * 64));
        const int8_t* from = x + chunk * 4;
        if (BITS == 4) {
            const __m512i low = _mm512_and_si512(found, below);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(found, 4), below);
            for (int t = 0; t < T; ++t) {
                total[t] = _mm512_dpbusd_epi32(total[t], low, four_everywhere(from + t * width));
                total[t] = _mm512_dpbusd_epi32(total[t], high, four_everywhere(from + t * width + 16));
            }
        } else {
            const __m512i some = _mm512_xor_si512(found, raise);
            for (int t = 0; t < T; ++t) total[t] = _mm512_dpbusd_epi32(total[t], some, four_everywhere(from + t * width));
        }
    }
    for (int t = 0; t < T; ++t) memcpy(sum[t], &total[t], sizeof total[t]);
}

}  // namespace

#include "x86.inl"
#include "kernels.inl"

const polyformer::Kernels polyformer::avx512_kernels = KERNELS("AVX512-VNNI");

#ifndef EMULATED
#pragma GCC pop_options
#endif

#endif
