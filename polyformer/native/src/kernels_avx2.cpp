// The functions for x86 processors with AVX2, FMA and F16C.

#if defined(__x86_64__) || defined(__i386__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "vectors.h"

#define INLINE_MEMBER inline __attribute__((always_inline))

namespace {

INLINE __m256i four_everywhere(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}

// Products of 16 rows × 32 columns of codes with whole numbers of T rows of x.
//
// Codes of 4 bits are no more than 15, so that pairs of products may be added up eight times in 16 bits. Of 8-bit
// codes, the absolute values are multiplied with numbers that take their signs: two products of 127² fit in 16 bits.
// Loops over chunks stay loops: unrolled, they want more registers than there are.
template <int BITS, int T>
INLINE void dots(const uint8_t* codes, const int8_t* x, int64_t width, i8x (&sum)[T][2]) {
    const __m256i ones = _mm256_set1_epi16(1), below = _mm256_set1_epi8(15);
    __m256i total[T][2];
    for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int chunk = 0; chunk < BITS; ++chunk) {
        const __m256i left = _mm256_loadu_si256((const __m256i*)(codes + chunk * 64));
        const __m256i right = _mm256_loadu_si256((const __m256i*)(codes + chunk * 64 + 32));
        const int8_t* from = x + chunk * 4;
        if (BITS == 4) {
            const __m256i low_left = _mm256_and_si256(left, below), low_right = _mm256_and_si256(right, below);
            const __m256i high_left = _mm256_and_si256(_mm256_srli_epi16(left, 4), below);
            const __m256i high_right = _mm256_and_si256(_mm256_srli_epi16(right, 4), below);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const __m256i low = four_everywhere(from + t * width), high = four_everywhere(from + t * width + 16);
                total[t][0] = _mm256_add_epi16(total[t][0], _mm256_maddubs_epi16(low_left, low));
                total[t][1] = _mm256_add_epi16(total[t][1], _mm256_maddubs_epi16(low_right, low));
                total[t][0] = _mm256_add_epi16(total[t][0], _mm256_maddubs_epi16(high_left, high));
                total[t][1] = _mm256_add_epi16(total[t][1], _mm256_maddubs_epi16(high_right, high));
            }
        } else {
            const __m256i left_size = _mm256_abs_epi8(left), right_size = _mm256_abs_epi8(right);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const __m256i four = four_everywhere(from + t * width);
                const __m256i pairs = _mm256_maddubs_epi16(left_size, _mm256_sign_epi8(four, left));
                const __m256i others = _mm256_maddubs_epi16(right_size, _mm256_sign_epi8(four, right));
                total[t][0] = _mm256_add_epi32(total[t][0], _mm256_madd_epi16(pairs, ones));
                total[t][1] = _mm256_add_epi32(total[t][1], _mm256_madd_epi16(others, ones));
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int half = 0; half < 2; ++half)
            sum[t][half] = (i8x)(BITS == 4 ? _mm256_madd_epi16(total[t][half], ones) : total[t][half]);
}

}  // namespace

#include "x86.inl"
#include "kernels.inl"

const polyformer::Kernels polyformer::avx2_kernels = KERNELS("AVX2");

#pragma GCC pop_options

#endif
