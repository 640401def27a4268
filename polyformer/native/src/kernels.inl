// The functions of a `Kernels` table, for whatever processor the including file is compiled for. It defines `dots`,
// `halves8`, `codes8` and `whole_numbers`; all else is the same everywhere. No function here may be shared with other files.
//
// Every output is summed up in one order, however many rows go in at once: so an answer does not depend on what else
// is in the batch.

#include <math.h>

namespace {

// How many bytes of a matrix are asked for beforehand; processors do so by themselves only within a page.
constexpr int64_t AHEAD = 2048;

template <int T>
INLINE void finish(f8 (&total)[T][2], int64_t first, const polyformer::Target& target) {
    for (int t = 0; t < T; ++t) {
        float* out = target.out + (first + t) * target.width;
        if (target.bias) {
            total[t][0] += load8(target.bias);
            total[t][1] += load8(target.bias + 8);
        }
        if (target.live == 16) {
            store8(out, total[t][0]);
            store8(out + 8, total[t][1]);
        } else {
            float some[16];
            store8(some, total[t][0]);
            store8(some + 8, total[t][1]);
            memcpy(out, some, (size_t)target.live * sizeof(float));
        }
    }
}

INLINE f8 floats8(const float* from) { return load8(from); }
INLINE f8 floats8(const uint16_t* from) { return halves8((const uint8_t*)from); }
INLINE f8 floats8(const int8_t* from) { return codes8(from); }

// T rows by P panels of 16 columns. One row alone has too few sums to keep a processor busy, of which each waits for its
// own last one: so several panels are gone through at once.
template <int T, int P, bool FETCH, class Number>
INLINE void float_tile(const float* a, int64_t a_width, const Number* b, int64_t b_width, int64_t apart, int64_t depth,
                       f8 (&total)[T][2 * P]) {
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < 2 * P; ++p) total[t][p] = all8(0);
    for (int64_t k = 0; k < depth; ++k, b += b_width) {
        if (FETCH) __builtin_prefetch((const char*)b + AHEAD);
        for (int p = 0; p < 2 * P; ++p) {
            const f8 found = floats8(b + p / 2 * apart + p % 2 * 8);
            for (int t = 0; t < T; ++t) total[t][p] += a[t * a_width + k] * found;
        }
    }
}

template <int BITS, bool MINIMA, int T>
INLINE void coded_tile(const uint8_t* block, const polyformer::Operand& x, int64_t first, f8 (&total)[T][2]) {
    constexpr int64_t before = MINIMA ? 64 : 32, bytes = before + BITS * 64;
    const int64_t width = x.groups * 32;
    const int8_t* codes = x.codes + first * width;
    const float *scales = x.scales + first * x.groups, *sums = x.sums + first * x.groups;
    for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = all8(0);
    for (int64_t g = 0; g < x.groups; ++g, block += bytes) {
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(block + AHEAD + line);
        i8x sum[T][2];
        dots<BITS, T>(block + before, codes + g * 32, width, sum);
        for (int half = 0; half < 2; ++half) {
            const f8 scale = halves8(block + 16 * half);
            f8 low;
            if (MINIMA) low = halves8(block + 32 + 16 * half);
            if (!MINIMA && BITS == 4) low = scale * -8.0f;  // where codes are 0 … 15, 8 stands for nothing
            for (int t = 0; t < T; ++t) {
                total[t][half] += __builtin_convertvector(sum[t][half], f8) * (scale * scales[t * x.groups + g]);
                if (MINIMA || BITS == 4) total[t][half] += low * sums[t * x.groups + g];
            }
        }
    }
}

template <class Tile>
INLINE void in_tiles(int64_t first, int64_t count, Tile tile) {
    while (count >= 4) tile.template run<4>(first), first += 4, count -= 4;
    if (count >= 2) tile.template run<2>(first), first += 2, count -= 2;
    if (count) tile.template run<1>(first);
}

template <int BITS, bool MINIMA>
struct CodedProduct {
    const uint8_t* block;
    const polyformer::Operand& x;
    const polyformer::Target& target;
    template <int T>
    INLINE_MEMBER void run(int64_t first) {
        f8 total[T][2];
        coded_tile<BITS, MINIMA, T>(block, x, first, total);
        finish<T>(total, first, target);
    }
};

template <int BITS, bool MINIMA>
void coded_product(const uint8_t* block, const polyformer::Operand& x, int64_t first, int64_t count,
                   const polyformer::Target& target) {
    in_tiles(first, count, CodedProduct<BITS, MINIMA>{block, x, target});
}

struct FloatProduct {
    const float* block;
    const polyformer::Operand& x;
    const polyformer::Target& target;
    template <int T>
    INLINE_MEMBER void run(int64_t first) {
        f8 total[T][2];
        float_tile<T, 1, true>(x.rows + first * x.width, x.width, block, 16, 0, x.width, total);
        finish<T>(total, first, target);
    }
};

INLINE void tiles_of_six(int64_t first, int64_t count, FloatProduct tile) {
    while (count >= 6 && count != 8) tile.run<6>(first), first += 6, count -= 6;
    while (count >= 4) tile.run<4>(first), first += 4, count -= 4;
    if (count >= 2) tile.run<2>(first), first += 2, count -= 2;
    if (count) tile.run<1>(first);
}

void float_product(const uint8_t* block, const polyformer::Operand& x, int64_t first, int64_t count,
                   const polyformer::Target& target) {
    tiles_of_six(first, count, FloatProduct{(const float*)block, x, target});
}

template <int T, int P, class Number>
INLINE void panels_of_rows(const polyformer::Panels& x, int64_t row) {
    const Number* b = (const Number*)x.b;
    float* c = x.c + row * x.c_width;
    int64_t panel = 0;
    for (; panel + P <= x.count; panel += P) {
        f8 total[T][2 * P];
        float_tile<T, P, false>(x.a + row * x.a_width, x.a_width, b + panel * x.apart, x.b_width, x.apart, x.depth, total);
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < 2 * P; ++p) store8(c + t * x.c_width + panel * 16 + p * 8, total[t][p]);
    }
    for (; panel < x.count; ++panel) {
        f8 total[T][2];
        float_tile<T, 1, false>(x.a + row * x.a_width, x.a_width, b + panel * x.apart, x.b_width, x.apart, x.depth, total);
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < 2; ++p) store8(c + t * x.c_width + panel * 16 + p * 8, total[t][p]);
    }
}

template <class Number>
void panels(const polyformer::Panels& x) {
    int64_t row = 0;
    for (; row + 6 <= x.rows; row += 6) panels_of_rows<6, 1, Number>(x, row);
    for (; row + 3 <= x.rows; row += 3) panels_of_rows<3, 2, Number>(x, row);
    for (; row < x.rows; ++row) panels_of_rows<1, 4, Number>(x, row);
}

void quantise(const float* x, int64_t n, int64_t groups, int8_t* codes, float* scales, float* sums) {
    for (int64_t g = 0; g < groups; ++g) {
        float some[32];
        const float* from = x + g * 32;
        if ((g + 1) * 32 > n) {
            memset(some, 0, sizeof some);
            if (n > g * 32) memcpy(some, from, (size_t)(n - g * 32) * sizeof(float));
            from = some;
        }
        f8 most = abs8(load8(from));
        for (int i = 8; i < 32; i += 8) most = max8(most, abs8(load8(from + i)));
        const float largest = max_of(most);
        const float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
        scales[g] = scale;
        sums[g] = scale * (float)whole_numbers(from, inverse, codes + g * 32);
    }
}

void softmax(float* x, int64_t n) {
    const int64_t whole = (n + 7) / 8 * 8;
    for (int64_t i = n; i < whole; ++i) x[i] = -3e38f;
    f8 most = load8(x);
    for (int64_t i = 8; i < whole; i += 8) most = max8(most, load8(x + i));
    const float largest = max_of(most);
    f8 total = all8(0);
    for (int64_t i = 0; i < whole; i += 8) {
        const f8 found = exp8(load8(x + i) - largest);
        store8(x + i, found);
        total += found;
    }
    const float inverse = 1.0f / sum_of(total);
    for (int64_t i = 0; i < whole; i += 8) store8(x + i, load8(x + i) * inverse);
    for (int64_t i = n; i < whole; ++i) x[i] = 0;
}

void norm(const float* x, float* out, int64_t n, const float* gain, const float* bias, float eps, float offset,
          bool centred) {
    const int64_t whole = n / 8 * 8;
    float mean = 0;
    if (centred) {
        f8 total = all8(0);
        for (int64_t i = 0; i < whole; i += 8) total += load8(x + i);
        mean = sum_of(total);
        for (int64_t i = whole; i < n; ++i) mean += x[i];
        mean /= (float)n;
    }
    f8 squares = all8(0);
    for (int64_t i = 0; i < whole; i += 8) {
        const f8 one = load8(x + i) - mean;
        squares += one * one;
    }
    float square = sum_of(squares);
    for (int64_t i = whole; i < n; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(square / (float)n + eps);
    for (int64_t i = 0; i < whole; i += 8) {
        f8 one = (load8(x + i) - mean) * scale;
        if (gain) one *= load8(gain + i) + offset;
        if (bias) one += load8(bias + i);
        store8(out + i, one);
    }
    for (int64_t i = whole; i < n; ++i) {
        float one = (x[i] - mean) * scale;
        if (gain) one *= gain[i] + offset;
        if (bias) one += bias[i];
        out[i] = one;
    }
}

INLINE f8 erf8(f8 x) {
    for (int i = 0; i < 8; ++i) x[i] = erff(x[i]);
    return x;
}

template <int FUNCTION>
INLINE f8 activated(f8 x) {
    switch (FUNCTION) {
        case 0: return max8(x, all8(0));
        case 1: x = max8(x, all8(0)); return x * x;
        case 2: return 0.5f * x * (1.0f + erf8(x * 0.70710678f));
        case 3: return 0.5f * x * (1.0f + tanh8(0.79788456f * (x + 0.044715f * x * x * x)));
        case 4: return x / (1.0f + exp8(-1.702f * x));
        case 5: return x / (1.0f + exp8(-x));
        case 6: return tanh8(x);
        default: return x;
    }
}

template <int FUNCTION>
void applied(const float* x, const float* times, float* out, int64_t n) {
    const int64_t whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        f8 one = activated<FUNCTION>(load8(x + i));
        if (times) one *= load8(times + i);
        store8(out + i, one);
    }
    if (whole < n) {
        float some[8] = {0}, others[8] = {0};
        memcpy(some, x + whole, (size_t)(n - whole) * sizeof(float));
        if (times) memcpy(others, times + whole, (size_t)(n - whole) * sizeof(float));
        f8 one = activated<FUNCTION>(load8(some));
        if (times) one *= load8(others);
        store8(some, one);
        memcpy(out + whole, some, (size_t)(n - whole) * sizeof(float));
    }
}

void apply(int32_t function, const float* x, const float* times, float* out, int64_t n) {
    switch (function) {
        case 0: return applied<0>(x, times, out, n);
        case 1: return applied<1>(x, times, out, n);
        case 2: return applied<2>(x, times, out, n);
        case 3: return applied<3>(x, times, out, n);
        case 4: return applied<4>(x, times, out, n);
        case 5: return applied<5>(x, times, out, n);
        case 6: return applied<6>(x, times, out, n);
        default: return applied<7>(x, times, out, n);
    }
}

float largest(const float* x, int64_t n, float* of_each) {
    i8x bad = i8x{0, 0, 0, 0, 0, 0, 0, 0};
    bool odd = false;
    float all = -INFINITY;
    for (int64_t first = 0; first < n; first += polyformer::SCAN, ++of_each) {
        float most = -INFINITY;
        if (first + polyformer::SCAN <= n) {
            f8 found = all8(-INFINITY);
            for (int64_t i = first; i < first + polyformer::SCAN; i += 8) {
                const f8 some = load8(x + i);
                bad |= ~(i8x)(some < all8(INFINITY));
                found = max8(some, found);
            }
            most = max_of(found);
        } else {
            for (int64_t i = first; i < n; ++i) {
                odd |= !(x[i] < INFINITY);
                most = x[i] > most ? x[i] : most;
            }
        }
        *of_each = most;
        all = most > all ? most : all;
    }
    for (int i = 0; i < 8; ++i) odd |= bad[i] != 0;
    return odd ? NAN : all;
}

double exponentials(const float* x, int64_t n, float most) {
    double all = 0;
    for (int64_t first = 0; first < n; first += polyformer::SCAN) {
        const int64_t end = first + polyformer::SCAN < n ? first + polyformer::SCAN : n;
        f8 total = all8(0);
        int64_t i = first;
        for (; i + 8 <= end; i += 8) total += exp8(load8(x + i) - most);
        all += (double)sum_of(total);
        for (; i < end; ++i) all += exp((double)(x[i] - most));
    }
    return all;
}

}  // namespace

#define KERNELS(NAME)                                                                                             \
    {                                                                                                             \
        NAME, quantise,                                                                                           \
            {float_product, coded_product<8, false>, coded_product<8, true>, coded_product<4, false>,             \
             coded_product<4, true>},                                                                             \
            {panels<float>, panels<uint16_t>, panels<int8_t>}, softmax, norm, apply, largest, exponentials     \
    }
