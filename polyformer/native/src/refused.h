// What is wrong with what was given: one sentence, which becomes an exception of Python's.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <stdexcept>

namespace polyformer {

struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn, gnu::format(printf, 1, 2)]] inline void refuse(const char* sentence, ...) {
    char text[256];
    va_list given;
    va_start(given, sentence);
    vsnprintf(text, sizeof text, sentence, given);
    va_end(given);
    throw Refused(text);
}

// The product of sizes, none of them negative; refuses what no memory could hold.
template <class... Sizes>
int64_t product_of(Sizes... sizes) {
    int64_t total = 1;
    for (int64_t one : {(int64_t)sizes...}) {
        if (one < 0 || __builtin_mul_overflow(total, one, &total) || total > (int64_t)1 << 46)
            refuse("a size of more than 2^46 is impossible");
    }
    return total;
}

}  // namespace polyformer
